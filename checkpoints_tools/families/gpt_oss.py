"""gpt-oss: every second layer has a window, softmax has sinks, all linear layers and the router have biases.

An expert computes (up + 1) * gate * sigmoid(1.702 * gate), both clamped: Megatron's quick GELU with an offset
and a clamp. What transformers stores of all experts of a layer is turned around, and of `gate_up_proj` every
second value is the gate's.
"""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments, softmax_router
from checkpoints_tools.families.expert_weights import (
    NORM_BEFORE_EXPERTS,
    expert_biases,
    experts_in_one_tensor,
    router,
)
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.weight import PAIRS, TURNED, TURNED_PAIRS
from checkpoints_tools.families.weights import attention, layer_weight, norms
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return (
        decoder_arguments(values)
        | expert_arguments(values, softmax_router(values, renormalised=True), size="intermediate_size")
        | {
            "add_bias_linear": True,
            "softmax_type": "learnable",
            "swiglu": False,
            "activation": "quick_gelu",
            "gated_mlp": True,
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": values.number("swiglu_limit"),
        }
    )


_EXPERTS = (
    router("mlp.router.weight"),
    layer_weight("mlp.router.bias", ("mlp.router.bias", ("experts",))),
    *experts_in_one_tensor(
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj", turned=TURNED_PAIRS, turned_down=TURNED
    ),
    *expert_biases("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias", layout=PAIRS),
)

GPT_OSS = Family(
    "gpt_oss",
    bridge_provider="GPTOSS",
    arguments=_arguments,
    neutral={
        **neutral_but("attention_bias"),
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
    },
    windows=IN_SOME_LAYERS,
    layer=(*norms(before_mlp=None), *attention(), NORM_BEFORE_EXPERTS, *_EXPERTS),
)
