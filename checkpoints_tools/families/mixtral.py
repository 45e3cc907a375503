"""Mixtral: experts, whose weights are always normalised to 1."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments, expert_arguments
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family
from checkpoints_tools.families.weights import ATTENTION, experts
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | expert_arguments(values, size="intermediate_size", renormalised=True)


MIXTRAL = Family(
    "mixtral",
    bridge_provider="Mixtral",
    arguments=_arguments,
    windows=IN_ALL_LAYERS,
    layer=(*ATTENTION, *experts("block_sparse_moe", "w1", "w3", "w2")),
)
