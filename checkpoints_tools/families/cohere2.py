"""Command R7B and Command A: attention and MLP side by side, no rotary embedding in full layers."""

from typing import Any

from checkpoints_tools.families.arguments import (
    activation_arguments,
    biases_by_keys,
    decoder_arguments,
)
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.layer_kinds import unrotated_full_layers
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return {
        **decoder_arguments(values, norm_epsilon="layer_norm_eps"),
        **activation_arguments(values, gated=True),
        **biases_by_keys(values),
        "normalization": "LayerNorm",
        "norm_bias": False,
        "parallel_mlp": True,
        "rotary_interleaved": True,
        **unrotated_full_layers(values),
        "logits_multiplier": values.number("logit_scale"),
    }


COHERE2 = Family(
    "cohere2",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "hidden_act"),
    windows=IN_SOME_LAYERS,
)
