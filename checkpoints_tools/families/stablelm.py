"""StableLM 2 and StableLM 3B: LayerNorm, a part of each head rotated, MLP after or beside the attention."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import NEUTRAL, Family
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values, norm_epsilon="layer_norm_eps", reads_partial=True) | {
        "normalization": "LayerNorm",
        "add_qkv_bias": values.boolean("use_qkv_bias"),
        "parallel_mlp": values.boolean("use_parallel_residual"),
    }


STABLELM = Family(
    "stablelm",
    arguments=_arguments,
    neutral={**NEUTRAL, "qk_layernorm": (False,)},  # True: each head has a LayerNorm of its own
)
