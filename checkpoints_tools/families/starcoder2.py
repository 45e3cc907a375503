"""StarCoder2: LayerNorm, an MLP without a gate, biases everywhere, and a window in all layers or in none."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, decoder_arguments
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family, neutral_but
from checkpoints_tools.families.weights import attention, norms, plain_mlp
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values, norm_epsilon="norm_epsilon")
    layer_norm = {"normalization": "LayerNorm", "add_bias_linear": values.boolean("use_bias")}
    return arguments | layer_norm | activation_arguments(values, gated=False)


STARCODER2 = Family(
    "starcoder2",
    bridge_provider="Starcoder2",
    arguments=_arguments,
    neutral=neutral_but("hidden_act"),
    windows=IN_ALL_LAYERS,
    layer=(*norms(), *attention(), *plain_mlp(up="c_fc", down="c_proj")),
)
