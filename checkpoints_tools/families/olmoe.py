"""OLMoE: experts in all layers; norms of query and key over all heads."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments, softmax_router
from checkpoints_tools.families.expert_weights import NORM_BEFORE_EXPERTS, experts_one_by_one, router
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import ATTENTION
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    chosen = softmax_router(values, renormalised=values.boolean("norm_topk_prob"))
    return (
        decoder_arguments(values)
        | biases_by_keys(values)
        | {"qk_layernorm": True, "qk_layernorm_span": "all_heads"}
        | expert_arguments(values, chosen, size="intermediate_size", count="num_experts")
    )


OLMOE = Family(
    "olmoe",
    bridge_provider="Olmoe|OlMoE",
    arguments=_arguments,
    neutral={**neutral_but("attention_bias"), "clip_qkv": (None,)},
    layer=(*ATTENTION, NORM_BEFORE_EXPERTS, router("mlp.gate.weight"), *experts_one_by_one("mlp")),
)
