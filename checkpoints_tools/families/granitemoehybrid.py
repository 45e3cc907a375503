"""Granite 4 where it is neither a hybrid nor has experts: Granite 3 with a fused MLP, rotated or not."""

from typing import Any

from checkpoints_tools.families.arguments import bias_arguments, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.granite import multipliers
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    for kind in values.any("layer_types"):
        if kind != "full_attention":
            raise ValueError(f"config.json: layer_types has {shown(kind)}: only attention is supported")
    has_biases = values.boolean("attention_bias")
    return {
        **decoder_arguments(values),
        **bias_arguments(query_key_value=has_biases, output=has_biases, mlp=False),
        **multipliers(values),
        "ffn_hidden_size": values.integer("shared_intermediate_size"),
        **_positions(values),
    }


def _positions(values: CheckedValues) -> dict[str, Any]:
    kind = values.one_of("position_embedding_type", ("rope", "nope", None))
    return {} if kind == "rope" else {"position_embedding_type": "none"}


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
