"""Jais 2: LayerNorm, biases, and an MLP without a gate, whose activation is the square of ReLU."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, bias_arguments, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, norms, plain_mlp
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    of_attention = values.boolean("attention_bias")
    return {
        **decoder_arguments(values, norm_epsilon="layer_norm_eps"),
        **bias_arguments(query_key_value=of_attention, output=of_attention, mlp=values.boolean("mlp_bias")),
        **activation_arguments(values, gated=False),
        "normalization": "LayerNorm",
    }


JAIS2 = Family(
    "jais2",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias", "hidden_act"),
    layer=(*norms(), *attention(), *plain_mlp()),
)
