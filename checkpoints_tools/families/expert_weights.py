"""The tensors of experts, of their router and of shared experts, by their Hugging Face names.

A layer has experts or a dense MLP: `moe_layer_freq` says which, and `dense_or_experts` puts both together.
"""

from collections.abc import Mapping
from typing import Any

from checkpoints_tools.families.weight import AS_IS, Weight
from checkpoints_tools.families.weights import in_layer, layer_weight

_FC1, _FC2 = "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"


def has_experts(args: Mapping[str, Any], layer: int) -> bool:
    """Whether the layer has experts, and not a dense MLP."""
    frequency = args.get("moe_layer_freq")
    return bool(args.get("num_experts")) and (not isinstance(frequency, list) or bool(frequency[layer]))


def dense_or_experts(dense: tuple[Weight, ...], experts: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """The first in dense layers, the second in layers with experts, of models that have such layers."""

    def of(weight: Weight, with_experts: bool) -> Weight:
        def is_in(args: Mapping[str, Any], layer: int) -> bool:
            return has_experts(args, layer) == with_experts and weight.is_in(args, layer)

        return weight._replace(only_in=is_in)

    return (*(of(weight, False) for weight in dense), *(of(weight, True) for weight in experts))


NORM_BEFORE_EXPERTS = layer_weight(
    "pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", ("hidden",))
)


def router(name: str, *, elsewhere: str | None = None, may_be_float32: bool = False) -> Weight:
    """Its weight, which may also be called `elsewhere`."""
    place = (in_layer(elsewhere),) if elsewhere else ()
    part = (name, ("experts", "hidden"), *place)
    return layer_weight("mlp.router.weight", part, may_be_float32=may_be_float32)


def correction_bias(name: str, *, is_row: bool = False) -> Weight:
    """What is added to scores where experts are chosen; no tensor in models without it.

    Args:
        is_row: it is stored as the only row of a matrix.
    """
    part = (name + "[0]", ("experts",), in_layer(name)) if is_row else (name, ("experts",))
    return layer_weight(
        "mlp.router.expert_bias", part, only_with="moe_router_enable_expert_bias", may_be_float32=True
    )


def experts_one_by_one(
    block: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Weight, ...]:
    """As most families publish them; transformers 5 may store all of a layer as one tensor."""
    expert, fused = block + ".experts.{expert}.", "mlp.experts."
    gate_and_up = (
        (f"{expert}{name}.weight", ("expert_ffn", "hidden"), in_layer(fused + "gate_up_proj", number, 2))
        for number, name in enumerate((gate, up))
    )
    return (
        layer_weight(_FC1 + ".weight", *gate_and_up, split_axis=0),
        layer_weight(
            _FC2 + ".weight",
            (f"{expert}{down}.weight", ("hidden", "expert_ffn"), in_layer(fused + "down_proj")),
            split_axis=1,
        ),
    )


def experts_in_one_tensor(
    gate_up: str, down: str, *, turned: str | None = None, turned_down: str | None = None
) -> tuple[Weight, ...]:
    """Of a layer: gate and up, and down.

    Args:
        turned, turned_down: the layouts of tensors whose rows are what Megatron has as columns.
    """
    first, last = ("expert_gate_up_ffn", "hidden"), ("hidden", "expert_ffn")
    return (
        expert_weight(_FC1 + ".weight", gate_up, first, turned, split_axis=0),
        expert_weight(_FC2 + ".weight", down, last, turned_down, split_axis=1),
    )


def expert_biases(gate_up: str, down: str, *, layout: str) -> tuple[Weight, ...]:
    """Of all experts of a layer."""
    return (
        expert_weight(_FC1 + ".bias", gate_up, ("expert_gate_up_ffn",), layout, split_axis=0),
        expert_weight(_FC2 + ".bias", down, ("hidden",)),
    )


def expert_weight(
    key: str, name: str, axes: tuple[str, ...], layout: str | None = None, split_axis: int | None = None
) -> Weight:
    """An expert's part of the tensor `name`, with the axes that Megatron has."""
    stored = axes[::-1] if layout and len(axes) > 1 else axes
    part = (name + "[{expert}]", stored, in_layer(name))
    return layer_weight(key, part, layout=layout or AS_IS, split_axis=split_axis)


def shared_experts(block: str, *, gate: str | None = None) -> tuple[Weight, ...]:
    """What every token goes through, in models that have it; its output may have a gate of one value."""
    is_there = "moe_shared_expert_intermediate_size"
    weights = [
        layer_weight(
            "mlp.shared_experts.linear_fc1.weight",
            *((f"{block}.{name}_proj.weight", ("shared_ffn", "hidden")) for name in ("gate", "up")),
            split_axis=0,
            only_with=is_there,
        ),
        layer_weight(
            "mlp.shared_experts.linear_fc2.weight",
            (f"{block}.down_proj.weight", ("hidden", "shared_ffn")),
            split_axis=1,
            only_with=is_there,
        ),
    ]
    if gate:
        part = (f"{gate}.weight", ("one", "hidden"))
        weights.append(
            layer_weight("mlp.shared_experts.gate_weight", part, only_with="moe_shared_expert_gate")
        )
    return tuple(weights)
