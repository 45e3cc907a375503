"""Which layers of a model have experts."""

from typing import Protocol


class LayersWithExperts(Protocol):
    """The fields of Megatron's `TransformerConfig` that say it."""

    num_layers: int
    num_moe_experts: int | None
    moe_layer_freq: int | list[int]


def expert_layers(shape: LayersWithExperts) -> tuple[bool, ...]:
    """For each layer, whether it has experts; else it has one MLP."""
    if not shape.num_moe_experts:
        return (False,) * shape.num_layers
    if isinstance(shape.moe_layer_freq, int):
        return tuple(layer % shape.moe_layer_freq == 0 for layer in range(shape.num_layers))
    return tuple(map(bool, shape.moe_layer_freq))
