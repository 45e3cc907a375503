"""Mistral without a sliding window."""

from checkpoints_tools.families.family import Family

MISTRAL = Family("mistral", bridge_provider="Mistral")
