"""Mistral: a sliding window in all layers, or in none."""

from checkpoints_tools.families.family import IN_ALL_LAYERS, Family

MISTRAL = Family("mistral", bridge_provider="Mistral", windows=IN_ALL_LAYERS)
