"""Ministral 8B: a sliding window in the layers that `layer_types` says."""

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family

MINISTRAL = Family("ministral", windows=IN_SOME_LAYERS)
