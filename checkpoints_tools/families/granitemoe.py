"""Granite 3 MoE: as Granite 3 with experts in all layers, which are stored as two tensors a layer."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments, softmax_router
from checkpoints_tools.families.expert_weights import NORM_BEFORE_EXPERTS, experts_in_one_tensor, router
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.granite import multipliers
from checkpoints_tools.families.weights import ATTENTION
from megatron_star.model.checked_values import CheckedValues

_BLOCK = "block_sparse_moe."


def _arguments(values: CheckedValues) -> dict[str, Any]:
    chosen = softmax_router(values, renormalised=True)
    return (
        decoder_arguments(values)
        | biases_by_keys(values)
        | multipliers(values)
        | expert_arguments(values, chosen, size="intermediate_size")
    )


GRANITEMOE = Family(
    "granitemoe",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    layer=(
        *ATTENTION,
        NORM_BEFORE_EXPERTS,
        router(_BLOCK + "router.layer.weight"),
        *experts_in_one_tensor(_BLOCK + "input_linear.weight", _BLOCK + "output_linear.weight"),
    ),
)
