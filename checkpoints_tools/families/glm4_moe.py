"""GLM-4.5 and 4.6: a part of each head rotated; after dense layers experts that biased sigmoids choose."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.mixed_experts import MIXED_MLP, after_dense_layers, sigmoid_routing
from checkpoints_tools.families.weights import ATTENTION
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values, reads_partial=True) | {
        "add_qkv_bias": values.boolean("attention_bias"),  # and not of the output
        "qk_layernorm": values.boolean("use_qk_norm"),
    }
    experts = after_dense_layers(values, arguments["num_layers"])
    return arguments | (experts | sigmoid_routing(values) if experts else {})


GLM4_MOE = Family(
    "glm4_moe",
    bridge_provider="GLM45|GLM46",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    has_prediction_layers=True,
    layer=(*ATTENTION, *MIXED_MLP),
)
