"""Qwen3-MoE: norms of query and key, experts, in some layers a dense MLP."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments, layers_by_step, softmax_router
from checkpoints_tools.families.expert_weights import (
    NORM_BEFORE_EXPERTS,
    dense_or_experts,
    experts_one_by_one,
    router,
)
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family, neutral_but
from checkpoints_tools.families.weights import ATTENTION, DENSE_MLP
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    chosen = softmax_router(values, renormalised=values.boolean("norm_topk_prob"))
    return (
        decoder_arguments(values)
        | biases_by_keys(values)
        | {"qk_layernorm": True}
        | expert_arguments(values, chosen, size="moe_intermediate_size", layers=layers_by_step(values))
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    bridge_provider="Qwen3(MoE|Moe)",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_only_layers", "decoder_sparse_step"),
    windows=IN_ALL_LAYERS,
    layer=(
        *ATTENTION,
        *dense_or_experts(
            DENSE_MLP, (NORM_BEFORE_EXPERTS, router("mlp.gate.weight"), *experts_one_by_one("mlp"))
        ),
    ),
)
