"""Granite with sinks, and with a sliding window in some layers, whose rotary base may be another."""

from typing import Any

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.granite import granite_arguments
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return granite_arguments(values) | {"softmax_type": "learnable"} | _rotary_bases(values)


def _rotary_bases(values: CheckedValues) -> dict[str, Any]:
    """Of `layer_rope_theta`, in which zero means that a layer is not rotated."""
    kinds, bases = values.any("layer_types"), values.any("layer_rope_theta")
    are_numbers = isinstance(bases, list) and all(type(base) in (int, float) and base >= 0 for base in bases)
    if not are_numbers or len(bases) != len(kinds):
        raise values.wrong("layer_rope_theta", f"a list of {len(kinds)} numbers")
    rotated = {(kind, base) for kind, base in zip(kinds, bases, strict=True) if base}
    by_kind, different = dict(rotated), {base for _, base in rotated}
    if len(rotated) > len(by_kind):
        raise values.wrong("layer_rope_theta", "one number in all layers of a kind, or zero")
    if len(different) > 1 and values.any("rope_parameters")["rope_type"] != "default":
        raise values.wrong("rope_parameters", "without scaling, where layer_rope_theta has several numbers")
    arguments = {} if all(bases) else {"no_rope_freq": [int(not base) for base in bases]}
    if different:
        arguments["rotary_base"] = by_kind.get("full_attention", max(different))
    if len(different) > 1:
        arguments["window_rotary_base"] = by_kind["sliding_attention"]
    return arguments


GRANITE_SWA = Family(
    "granite_swa",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
    windows=IN_SOME_LAYERS,
)
