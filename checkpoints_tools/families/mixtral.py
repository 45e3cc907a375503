"""Mixtral: experts, whose weights are always normalised to 1."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments, softmax_router
from checkpoints_tools.families.expert_weights import NORM_BEFORE_EXPERTS, experts_one_by_one, router
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family
from checkpoints_tools.families.weights import ATTENTION
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    chosen = softmax_router(values, renormalised=True)
    return decoder_arguments(values) | expert_arguments(values, chosen, size="intermediate_size")


MIXTRAL = Family(
    "mixtral",
    bridge_provider="Mixtral",
    arguments=_arguments,
    windows=IN_ALL_LAYERS,
    layer=(
        *ATTENTION,
        NORM_BEFORE_EXPERTS,
        router("block_sparse_moe.gate.weight", elsewhere="mlp.gate.weight"),
        *experts_one_by_one("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
)
