"""Jais 2: LayerNorm, biases, and an MLP without a gate, whose activation is the square of ReLU."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, norms, plain_mlp
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return {
        **decoder_arguments(values, norm_epsilon="layer_norm_eps"),
        **biases_by_keys(values),
        **activation_arguments(values, gated=False),
        "normalization": "LayerNorm",
    }


JAIS2 = Family(
    "jais2",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias", "hidden_act"),
    layer=(*norms(), *attention(), *plain_mlp()),
)
