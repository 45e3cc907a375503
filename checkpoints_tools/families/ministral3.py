"""Ministral 3, the language model: queries are scaled by their position."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family
from checkpoints_tools.families.rotary_arguments import query_scale_arguments
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | query_scale_arguments(values)


MINISTRAL3 = Family("ministral3", bridge_provider="Ministral3", arguments=_arguments, windows=IN_ALL_LAYERS)
