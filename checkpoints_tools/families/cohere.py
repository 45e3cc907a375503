"""Command R and Aya 23: attention beside the MLP, LayerNorm without a bias, neighboring values rotated."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def cohere_arguments(values: CheckedValues) -> dict[str, Any]:
    """Also of Cohere 2."""
    return {
        **decoder_arguments(values, norm_epsilon="layer_norm_eps"),
        **activation_arguments(values, gated=True),
        **biases_by_keys(values),
        "normalization": "LayerNorm",
        "norm_bias": False,
        "parallel_mlp": True,
        "rotary_interleaved": True,
        "logits_multiplier": float(values.number("logit_scale")),
    }


COHERE = Family(
    "cohere",
    arguments=cohere_arguments,
    neutral={
        **neutral_but("attention_bias", "hidden_act"),
        "use_qk_norm": (False, None),  # True: LayerNorm with weights for each head
    },
)
