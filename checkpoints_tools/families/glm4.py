"""GLM-4-0414 and GLM-Z1, 9B and 32B: as GLM-4 with norms after attention and MLP too."""

from typing import Any

from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.glm import glm_arguments
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return glm_arguments(values) | {"norm_placement": "both"}


GLM4 = Family(
    "glm4",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    layer=(
        *attention(),
        *gated_mlp(fused="gate_up_proj"),
        *norms(
            before_mlp="post_attention_layernorm",
            after_attention="post_self_attn_layernorm",
            after_mlp="post_mlp_layernorm",
        ),
    ),
)
