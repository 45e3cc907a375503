"""GLM-4.7-Flash: DeepSeek V3's attention and routing; a list says which layers have experts."""

from typing import Any

from checkpoints_tools.families.deepseek_v3 import DEEPSEEK_V3_NEUTRAL
from checkpoints_tools.families.family import Family
from checkpoints_tools.families.latent_attention import latent_attention, latent_attention_arguments
from checkpoints_tools.families.mixed_experts import MIXED_MLP, in_sparse_layers, sigmoid_routing
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = latent_attention_arguments(values)
    experts = in_sparse_layers(values, arguments["num_layers"])
    return arguments | (experts | sigmoid_routing(values) if experts else {})


GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    arguments=_arguments,
    neutral=DEEPSEEK_V3_NEUTRAL,
    has_prediction_layers=True,
    layer=(*latent_attention(), *MIXED_MLP),
)
