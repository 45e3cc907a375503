"""Ministral 3, the language model: queries are scaled by their position."""

from checkpoints_tools.families.family import IN_ALL_LAYERS, Family

MINISTRAL3 = Family("ministral3", bridge_provider="Ministral3", windows=IN_ALL_LAYERS)
