"""Granite with sinks, and with a sliding window in some layers, whose rotary base may be another."""

from typing import Any

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.granite import granite_arguments
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return granite_arguments(values) | {"softmax_type": "learnable"} | _rotary_bases(values)


def _rotary_bases(values: CheckedValues) -> dict[str, Any]:
    """Of `layer_rope_theta`: zero means that a layer is not rotated."""
    kinds, bases = values.any("layer_types"), values.any("layer_rope_theta")
    if not isinstance(bases, list) or len(bases) != len(kinds):
        raise values.wrong("layer_rope_theta", f"a list of {len(kinds)} numbers")
    of_kind = {kind: {base for of, base in zip(kinds, bases, strict=True) if of == kind and base} for kind in kinds}
    if any(len(found) > 1 for found in of_kind.values()):
        raise ValueError(f"config.json: layer_rope_theta={shown(bases)}: one base for each kind of layers")
    return of_kind


GRANITE_SWA = Family(
    "granite_swa",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
    windows=IN_SOME_LAYERS,
)
