"""ERNIE 4.5 MoE: experts by a softmax whose choice has a bias, in some layers; neighboring values rotated."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments
from checkpoints_tools.families.expert_weights import (
    NORM_BEFORE_EXPERTS,
    correction_bias,
    dense_or_experts,
    experts_one_by_one,
    router,
    shared_experts,
)
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import ATTENTION, DENSE_MLP
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    size, shared = (
        values.integer("moe_intermediate_size"),
        values.integer("moe_num_shared_experts", least=0),
    )
    chosen = {
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_normalised": True,
        **({"moe_shared_expert_intermediate_size": size * shared} if shared else {}),
    }
    return (
        decoder_arguments(values)
        | {"rotary_interleaved": True}
        | expert_arguments(
            values,
            chosen,
            size="moe_intermediate_size",
            count="moe_num_experts",
            chosen="moe_k",
            layers=_layers(values),
        )
    )


def _layers(values: CheckedValues) -> list[bool]:
    """Every so many layers, from the first one that may have experts to the last one."""
    first, last = (values.integer(f"moe_layer_{end}_index", least=0) for end in ("start", "end"))
    step = values.integer("moe_layer_interval")
    layers = range(values.integer("num_hidden_layers"))
    return [first <= layer <= last and (layer + 1) % step == 0 for layer in layers]


ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    bridge_provider="Ernie45Moe",
    arguments=_arguments,
    neutral={**neutral_but(), "use_bias": (False, None), "moe_norm_min": (1e-12,)},
    has_prediction_layers=True,
    layer=(
        *ATTENTION,
        *dense_or_experts(
            DENSE_MLP,
            (
                NORM_BEFORE_EXPERTS,
                router("mlp.gate.weight", may_be_float32=True),
                correction_bias("mlp.moe_statics.e_score_correction_bias", is_row=True),
                *experts_one_by_one("mlp"),
                *shared_experts("mlp.shared_experts"),
            ),
        ),
    ),
)
