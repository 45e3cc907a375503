"""Qwen2-MoE and Qwen1.5-MoE: experts beside a gated one for every token, or a dense MLP, by layer."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments, layers_by_step, softmax_router
from checkpoints_tools.families.expert_weights import (
    NORM_BEFORE_EXPERTS,
    dense_or_experts,
    experts_one_by_one,
    router,
    shared_experts,
)
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.weights import ATTENTION, DENSE_MLP
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    chosen = softmax_router(values, renormalised=values.boolean("norm_topk_prob")) | {
        "moe_shared_expert_intermediate_size": values.integer("shared_expert_intermediate_size"),
        "moe_shared_expert_gate": True,
    }
    return (
        decoder_arguments(values)
        | {"add_qkv_bias": values.boolean("qkv_bias")}
        | expert_arguments(
            values,
            chosen,
            size="moe_intermediate_size",
            count="num_experts",
            layers=layers_by_step(values),
        )
    )


QWEN2_MOE = Family(
    "qwen2_moe",
    bridge_provider="Qwen2MoE|Qwen2Moe",
    arguments=_arguments,
    neutral=neutral_but("mlp_only_layers", "decoder_sparse_step"),
    windows=IN_SOME_LAYERS,
    layer=(
        *ATTENTION,
        *dense_or_experts(
            DENSE_MLP,
            (
                NORM_BEFORE_EXPERTS,
                router("mlp.gate.weight"),
                *experts_one_by_one("mlp"),
                *shared_experts("mlp.shared_expert", gate="mlp.shared_expert_gate"),
            ),
        ),
    ),
)
