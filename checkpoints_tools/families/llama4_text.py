"""Llama 4, text: layers whose tokens see their own chunk only, and layers without rotary embedding.

The former normalise queries and keys (without a weight, so that it is the same before and after they are
rotated). The latter see everything and, with `attn_temperature_tuning`, scale queries by their position.
"""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.layer_kinds import unrotated_layers
from checkpoints_tools.families.weight import TURNED, Condition
from checkpoints_tools.families.weights import NORM_BEFORE_EXPERTS, attention, layer_weight, norms
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues
from megatron_star.model.recorded_arguments import MOST_LAYERS


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
    """Of a dense MLP in all layers, or of experts in all: chosen by sigmoids, beside one for every token."""
    with_experts = values.any("moe_layers")
    if not isinstance(with_experts, list):
        raise values.wrong("moe_layers", "a list of layers")
    dense = {"ffn_hidden_size": values.integer("intermediate_size_mlp")}
    if not {*with_experts} & {*range(layers)}:
        return dense
    if not {*range(layers)} <= {*with_experts}:
        raise ValueError(
            f"config.json: moe_layers={shown(with_experts)}: experts in some layers only are not supported"
        )
    return dense | {
        "num_experts": values.integer("num_local_experts", most=MOST_LAYERS),
        "moe_ffn_hidden_size": values.integer("intermediate_size"),
        "moe_shared_expert_intermediate_size": values.integer("intermediate_size"),
        # Of several, Megatron would normalise the sigmoids to 1.
        "moe_router_topk": values.integer("num_experts_per_tok", most=1),
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": 1,
    }


def _experts(args: Any) -> bool:
    return bool(args.get("num_experts"))


def _dense(args: Any) -> bool:
    return not _experts(args)


def _gated(key: str, block: str, size: str, condition: Condition) -> Any:
    gate_and_up = ((f"feed_forward.{block}{name}_proj.weight", (size, "hidden")) for name in ("gate", "up"))
    down = (f"feed_forward.{block}down_proj.weight", ("hidden", size))
    return (
        layer_weight(f"{key}.linear_fc1.weight", *gate_and_up, split_axis=0, only_with=condition),
        layer_weight(f"{key}.linear_fc2.weight", down, split_axis=1, only_with=condition),
    )


_MLP = (
    *(weight._replace(only_with=_dense) for weight in norms()[2:3]),
    *_gated("mlp", "", "ffn", _dense),
    NORM_BEFORE_EXPERTS._replace(only_with=_experts),
    layer_weight(
        "mlp.router.weight", ("feed_forward.router.weight", ("experts", "hidden")), only_with=_experts
    ),
    layer_weight(
        "mlp.experts.experts.linear_fc1.weight",
        ("feed_forward.experts.gate_up_proj", ("experts", "hidden", "expert_gate_up_ffn")),
        layout=TURNED,
        split_axis=1,
        only_with=_experts,
    ),
    layer_weight(
        "mlp.experts.experts.linear_fc2.weight",
        ("feed_forward.experts.down_proj", ("experts", "expert_ffn", "hidden")),
        layout=TURNED,
        split_axis=2,
        only_with=_experts,
    ),
    *_gated("mlp.shared_experts", "shared_expert.", "shared_ffn", _experts),
)

LLAMA4_TEXT = Family(
    "llama4_text",
    bridge_provider="Llama4",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    windows=IN_SOME_LAYERS,
    layer=(*norms(before_mlp=None), *attention(), *_MLP),
)
