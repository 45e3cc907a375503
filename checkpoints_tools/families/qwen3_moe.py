"""Qwen3-MoE: norms of query and key, experts."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments, expert_arguments
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family
from checkpoints_tools.families.weights import ATTENTION, experts
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values) | {"qk_layernorm": True}
    renormalised = values.boolean("norm_topk_prob")
    return arguments | expert_arguments(values, size="moe_intermediate_size", renormalised=renormalised)


QWEN3_MOE = Family(
    "qwen3_moe",
    bridge_provider="Qwen3(MoE|Moe)",
    arguments=_arguments,
    windows=IN_ALL_LAYERS,
    layer=(*ATTENTION, *experts("mlp", "gate_proj", "up_proj", "down_proj")),
)
