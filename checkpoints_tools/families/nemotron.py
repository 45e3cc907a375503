"""Nemotron 3 and 4, Minitron: LayerNorm around 1, squared ReLU without a gate, half of a head is rotated."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, norms, plain_mlp
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    norm = {"normalization": "LayerNorm", "apply_layernorm_1p": True}
    arguments = decoder_arguments(values, norm_epsilon="norm_eps", reads_partial=True)
    return arguments | norm | activation_arguments(values, gated=False) | biases_by_keys(values)


NEMOTRON = Family(
    "nemotron",
    bridge_provider="Nemotron",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias", "hidden_act"),
    layer=(*norms(), *attention(), *plain_mlp()),
)
