"""Hunyuan, dense: queries and keys are normalised after they are rotated."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    norms_of_heads = {"qk_layernorm": True, "qk_layernorm_after_rotation": True}
    return decoder_arguments(values, reads_alpha=True) | biases_by_keys(values) | norms_of_heads


HUNYUAN_V1_DENSE = Family(
    "hunyuan_v1_dense",
    bridge_provider="HunyuanV1Dense",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    layer=(
        *norms(),
        *attention(query_norm="query_layernorm", key_norm="key_layernorm"),
        *gated_mlp(),
    ),
)
