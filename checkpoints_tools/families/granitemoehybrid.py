"""Granite 4 where it is neither a hybrid nor has experts: Granite 3 with a fused MLP, rotated or not."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.granite import multipliers
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    for kind in values.any("layer_types"):
        if kind != "full_attention":
            raise ValueError(f"config.json: layer_types has {shown(kind)}: only attention is supported")
    return {
        **decoder_arguments(values),
        **biases_by_keys(values),
        **multipliers(values),
        "ffn_hidden_size": values.integer("shared_intermediate_size"),
        **_unrotated_layers(values),
    }


def _unrotated_layers(values: CheckedValues) -> dict[str, Any]:
    """All of them, or none."""
    if values.one_of("position_embedding_type", ("rope", "nope", None)) == "rope":
        return {}
    return {"no_rope_freq": [1] * values.integer("num_hidden_layers")}


GRANITEMOEHYBRID = Family(
    "granitemoehybrid",
    arguments=_arguments,
    neutral={**neutral_but("attention_bias"), "num_local_experts": (0,)},
    layer=(
        *norms(),
        *attention(),
        *gated_mlp(block="shared_mlp", fused="input_linear", down="output_linear"),
    ),
)
