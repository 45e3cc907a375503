"""DeepSeek V2, V2 Lite and V2.5: latent attention, experts by softmax after dense layers, shared experts."""

from typing import Any

from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.latent_attention import latent_attention, latent_attention_arguments
from checkpoints_tools.families.mixed_experts import MIXED_MLP, after_dense_layers, softmax_routing
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = latent_attention_arguments(values)
    experts = after_dense_layers(values, arguments["num_layers"])
    return arguments | (experts | softmax_routing(values) if experts else {})


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    bridge_provider="DeepSeekV2(Lite)?",
    arguments=_arguments,
    neutral={
        **neutral_but(),
        "norm_topk_prob": (False, None),  # transformers' model has no such thing
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
    },
    layer=(*latent_attention(), *MIXED_MLP),
)
