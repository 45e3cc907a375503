"""Megatron's arguments of experts, and of the router that chooses them."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_star.model.checked_values import CheckedValues
from megatron_star.model.recorded_arguments import MOST_LAYERS


def expert_arguments(
    values: CheckedValues,
    router: Mapping[str, Any],
    *,
    size: str,
    count: str = "num_local_experts",
    chosen: str = "num_experts_per_tok",
    layers: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Of a model with experts; none where no layer has any.

    Args:
        router: how it weights the chosen experts: of one of the functions below.
        size, count, chosen: the keys of an expert's size, and of how many there are, and are chosen.
        layers: for each layer whether it has experts, and not a dense MLP; None: all have.
    """
    if layers is not None and not any(layers):
        return {}
    num_experts = values.integer(count, most=MOST_LAYERS)
    return {
        "num_experts": num_experts,
        "moe_ffn_hidden_size": values.integer(size),
        "moe_router_topk": values.integer(chosen, most=num_experts),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": 1 if layers is None or all(layers) else [int(is_there) for is_there in layers],
        **router,
    }


def softmax_router(values: CheckedValues, *, renormalised: bool) -> dict[str, Any]:
    """Weights are those of a softmax over all experts.

    Args:
        renormalised: those of the chosen experts are normalised to 1: softmax over the chosen ones
            (Megatron's default) equals softmax over all, renormalised.
    """
    if renormalised and values.any("num_experts_per_tok") == 1:  # Megatron gives it its probability
        return {"moe_router_pre_softmax": True, "moe_router_normalised": True}
    return {"moe_router_pre_softmax": not renormalised}


def layers_by_step(values: CheckedValues) -> list[bool]:
    """Of Qwen: every `decoder_sparse_step`-th layer has experts, but those of `mlp_only_layers`."""
    dense, step = values.any("mlp_only_layers"), values.integer("decoder_sparse_step")
    layers = range(values.integer("num_hidden_layers"))
    return [layer not in dense and (layer + 1) % step == 0 for layer in layers]
