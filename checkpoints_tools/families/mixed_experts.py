"""Experts behind dense layers, beside one MLP that every token has: of DeepSeek's models and their kin."""

from typing import Any

from checkpoints_tools.families.expert_arguments import expert_arguments
from checkpoints_tools.families.expert_weights import (
    NORM_BEFORE_EXPERTS,
    correction_bias,
    dense_or_experts,
    experts_one_by_one,
    router,
    shared_experts,
)
from checkpoints_tools.families.weights import DENSE_MLP
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues

_SPARSE, _DENSE = "sparse", "dense"


def after_dense_layers(values: CheckedValues, num_layers: int) -> dict[str, Any]:
    """Experts in all layers but the first `first_k_dense_replace`; nothing if those are all layers."""
    dense = values.integer("first_k_dense_replace", least=0)
    return _experts(values, [layer >= dense for layer in range(num_layers)])


def in_sparse_layers(values: CheckedValues, num_layers: int) -> dict[str, Any]:
    """Experts in the layers that `mlp_layer_types` calls sparse; nothing if it calls none so."""
    kinds = values.any("mlp_layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise values.wrong("mlp_layer_types", f"a list of {num_layers}, one for each layer")
    for kind in kinds:
        if kind not in (_SPARSE, _DENSE):
            raise ValueError(f"config.json: mlp_layer_types has {shown(kind)}, which is not supported")
    return _experts(values, [kind == _SPARSE for kind in kinds])


def _experts(values: CheckedValues, layers: list[bool]) -> dict[str, Any]:
    if not any(layers):
        return {}
    size = values.integer("moe_intermediate_size")
    beside = {"moe_shared_expert_intermediate_size": size * values.integer("n_shared_experts")}
    return expert_arguments(
        values, beside, size="moe_intermediate_size", count="n_routed_experts", layers=layers
    )


def sigmoid_routing(values: CheckedValues) -> dict[str, Any]:
    """Sigmoids, to which a bias is added where experts are chosen, and the groups of experts before them."""
    groups = _groups(values)
    if groups and values.integer("num_experts_per_tok") // groups["moe_router_group_topk"] != 2:
        raise values.wrong(
            "num_experts_per_tok",
            f"twice topk_group, {groups['moe_router_group_topk']}: the best two of a group choose it",
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        **_normalised(values),
        **_scaling_factor(values),
        **groups,
    }


def softmax_routing(values: CheckedValues) -> dict[str, Any]:
    """The largest of a softmax over all experts, not normalised; or those of the groups with the largest."""
    method = values.one_of("topk_method", ("greedy", "group_limited_greedy"))
    groups = _groups(values) if method == "group_limited_greedy" else {}
    return {
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
        **_scaling_factor(values),
        **(groups | {"moe_router_group_score": "max"} if groups else {}),
    }


def _normalised(values: CheckedValues) -> dict[str, bool]:
    """Where it is not what Megatron does with sigmoids: of several experts they are divided by their sum."""
    normalised, by_megatron = values.boolean("norm_topk_prob"), values.integer("num_experts_per_tok") > 1
    return {} if normalised == by_megatron else {"moe_router_normalised": normalised}


def _scaling_factor(values: CheckedValues) -> dict[str, float]:
    factor = values.number("routed_scaling_factor")
    return {} if factor == 1 else {"moe_router_topk_scaling_factor": float(factor)}


def _groups(values: CheckedValues) -> dict[str, int]:
    """Into how many groups experts are divided, and of how many of them a token's are; nothing if of all."""
    experts = values.integer("n_routed_experts")
    groups = values.integer("n_group", most=experts)
    chosen = values.integer("topk_group", most=groups)
    if experts % groups:
        raise values.wrong("n_group", f"a divisor of n_routed_experts, {experts}")
    most = chosen * (experts // groups)
    if values.integer("num_experts_per_tok") > most:
        raise values.wrong("num_experts_per_tok", f"at most {most}, as many as {chosen} groups have")
    return {} if chosen == groups else {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


MIXED_MLP = dense_or_experts(
    DENSE_MLP,
    (
        NORM_BEFORE_EXPERTS,
        router("mlp.gate.weight", may_be_float32=True),
        correction_bias("mlp.gate.e_score_correction_bias"),
        *experts_one_by_one("mlp"),
        *shared_experts("mlp.shared_experts"),
    ),
)
"""A dense MLP with its norm, or experts with theirs, by layer."""
