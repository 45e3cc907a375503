"""GLM-4 9B: half of a head is rotated, in interleaved pairs; gate and up are one tensor."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def glm_arguments(values: CheckedValues) -> dict[str, Any]:
    """What GLM-4 and GLM-4-0414 share; their `attention_bias` is not of the output."""
    biases = {"add_qkv_bias": values.boolean("attention_bias")}
    return decoder_arguments(values, reads_partial=True) | biases | {"rotary_interleaved": True}


GLM = Family(
    "glm",
    arguments=glm_arguments,
    neutral=neutral_but("attention_bias"),
    layer=(*attention(), *gated_mlp(fused="gate_up_proj"), *norms()),
)
