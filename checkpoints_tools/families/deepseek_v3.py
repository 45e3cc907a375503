"""DeepSeek V3, V3.1 and R1: latent attention, and after dense layers experts that biased sigmoids choose."""

from typing import Any

from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.latent_attention import latent_attention, latent_attention_arguments
from checkpoints_tools.families.mixed_experts import MIXED_MLP, after_dense_layers, sigmoid_routing
from megatron_star.model.checked_values import CheckedValues


def deepseek_v3_arguments(values: CheckedValues) -> dict[str, Any]:
    """Of DeepSeek V3, and of models that have its code under another name."""
    arguments = latent_attention_arguments(values)
    experts = after_dense_layers(values, arguments["num_layers"])
    return arguments | (experts | sigmoid_routing(values) if experts else {})


DEEPSEEK_V3_NEUTRAL = {
    **neutral_but(),
    "rope_interleave": (True,),
    "index_topk": (None,),  # DSA; exact attention without its indexer is another model
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    bridge_provider="DeepSeekV3",
    arguments=deepseek_v3_arguments,
    neutral=DEEPSEEK_V3_NEUTRAL,
    has_prediction_layers=True,
    layer=(*latent_attention(), *MIXED_MLP),
)
