"""Apertus: an MLP without a gate and with xIELU (arXiv 2411.13010), whose numbers are learned; q/k norms."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, layer_weight, norms, plain_mlp
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values) | activation_arguments(values, gated=False)
    return arguments | biases_by_keys(values) | {"qk_layernorm": True}


_XIELU = tuple(
    layer_weight(f"mlp.activation_func.{name}", (f"mlp.act_fn.{name}", axes))
    for name, axes in (("alpha_p", ("one",)), ("alpha_n", ("one",)), ("beta", ()), ("eps", ()))
)

APERTUS = Family(
    "apertus",
    bridge_provider="Apertus",
    arguments=_arguments,
    neutral={**neutral_but("attention_bias"), "hidden_act": ("xielu",)},
    layer=(
        *norms(before_attention="attention_layernorm", before_mlp="feedforward_layernorm"),
        *attention(),
        *plain_mlp(),
        *_XIELU,
    ),
)
