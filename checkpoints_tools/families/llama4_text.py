"""Llama 4, text: layers whose tokens see their own chunk only, and layers without rotary embedding.

The former normalise queries and keys (without a weight, so that it is the same before and after they are
rotated). The latter see everything and, with `attn_temperature_tuning`, scale queries by their position.
"""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.expert_arguments import expert_arguments
from checkpoints_tools.families.expert_weights import (
    NORM_BEFORE_EXPERTS,
    dense_or_experts,
    experts_in_one_tensor,
    router,
    shared_experts,
)
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.layer_kinds import unrotated_layers
from checkpoints_tools.families.weight import TURNED
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values) | biases_by_keys(values) | {"rotary_interleaved": True}
    unrotated = unrotated_layers(values)
    arguments |= unrotated
    if values.boolean("use_qk_norm"):
        arguments |= {"qk_l2_norm": True, "qk_norm_of_rotated_only": bool(unrotated)}
    if values.boolean("attn_temperature_tuning") and unrotated:
        arguments |= _query_scale(values, unrotated["no_rope_freq"])
    return arguments | _mlp_arguments(values, arguments["num_layers"])


def _query_scale(values: CheckedValues, layers: list[int]) -> dict[str, Any]:
    return {
        "query_scale_beta": values.number("attn_scale"),
        "query_scale_floor": values.integer("floor_scale"),
        "query_scale_offset": 1,  # positions count from 1 there
        "query_scale_layers": layers,
    }


def _mlp_arguments(values: CheckedValues, layers: int) -> dict[str, Any]:
    """Of dense MLPs, or of experts: chosen by sigmoids, beside one for every token."""
    found = values.any("moe_layers")
    if not isinstance(found, list):
        raise values.wrong("moe_layers", "a list of layers")
    with_experts = [layer in found for layer in range(layers)]
    dense = {"ffn_hidden_size": values.integer("intermediate_size_mlp")}
    if not any(with_experts):
        return dense
    values.integer("num_experts_per_tok", most=1)  # of several, Megatron would normalise the sigmoids to 1
    chosen = {
        "moe_shared_expert_intermediate_size": values.integer("intermediate_size"),
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
    }
    return dense | expert_arguments(values, chosen, size="intermediate_size", layers=with_experts)


_BLOCK = "feed_forward"
_MLP = dense_or_experts(
    (*norms()[2:3], *gated_mlp(block=_BLOCK)),
    (
        NORM_BEFORE_EXPERTS,
        router(_BLOCK + ".router.weight"),
        *experts_in_one_tensor(
            _BLOCK + ".experts.gate_up_proj",
            _BLOCK + ".experts.down_proj",
            turned=TURNED,
            turned_down=TURNED,
        ),
        *shared_experts(_BLOCK + ".shared_expert"),
    ),
)

LLAMA4_TEXT = Family(
    "llama4_text",
    bridge_provider="Llama4",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    windows=IN_SOME_LAYERS,
    layer=(*norms(before_mlp=None), *attention(), *_MLP),
)
