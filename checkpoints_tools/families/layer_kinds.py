"""The kinds of layers of a resolved Hugging Face configuration, in Megatron's argument names and ours.

`layer_types` of the resolved configuration is made of whatever the config.json of the family has: a list, a
pattern, a first layer with a window. Families without it have a window in all layers, or in none.
"""

from collections.abc import Mapping
from typing import Any

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues

_FULL, _WINDOW, _CHUNK = "full_attention", "sliding_attention", "chunked_attention"


def layer_kind_arguments(family: Family, values: CheckedValues, args: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have a window or chunks, and of which size; nothing where no layer has.

    A window, or a chunk, that is as long as the longest context is none: every token sees all before it, and
    the mask that the user's options choose applies. Unless its layers have a rotary embedding of their own.

    Args:
        args: what the family has made of the configuration.

    Raises:
        ValueError: a layer is of another kind, a size is missing, or the family has no such layers.
    """
    kinds = _kinds(family, values, args["num_layers"])
    if family.windows is None and any(kind != _FULL for kind in kinds):
        found = values.any("sliding_window")
        raise ValueError(f"config.json: sliding_window={found} is not supported for {family.model_type}")
    arguments: dict[str, Any] = {}
    if _WINDOW in kinds and _counts(values.integer("sliding_window"), args):
        # Megatron: how many tokens before and after its own a token sees. transformers: how many in all.
        arguments["window_size"] = [values.integer("sliding_window") - 1, 0]
        arguments["window_attn_skip_freq"] = [int(kind == _WINDOW) for kind in kinds]
    if _CHUNK in kinds and _counts(values.integer("attention_chunk_size"), args):
        arguments["attention_chunk_size"] = values.integer("attention_chunk_size")
        arguments["chunked_layers"] = [int(kind == _CHUNK) for kind in kinds]
    return arguments


def _counts(size: int, args: Mapping[str, Any]) -> bool:
    return size < args["max_position_embeddings"] or args.get("window_rotary_base") is not None


def _kinds(family: Family, values: CheckedValues, num_layers: int) -> list[str]:
    if family.windows != IN_SOME_LAYERS:
        return [_FULL if values.any("sliding_window", None) is None else _WINDOW] * num_layers
    kinds = values.any("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise values.wrong("layer_types", f"a list of {num_layers}, one for each layer")
    for kind in kinds:
        if kind not in (_FULL, _WINDOW, _CHUNK):
            raise ValueError(f"config.json: layer_types has {shown(kind)}, which is not supported")
    return kinds


def unrotated_layers(values: CheckedValues) -> dict[str, Any]:
    """`no_rope_freq` of `no_rope_layers`, in which, whatever its name, 1 means that a layer is rotated."""
    return _unrotated(
        [not one for one in values.flags("no_rope_layers", values.integer("num_hidden_layers"))]
    )


def unrotated_full_layers(values: CheckedValues) -> dict[str, Any]:
    """`no_rope_freq` where only the layers with a window are rotated."""
    return _unrotated([kind == _FULL for kind in values.any("layer_types")])


def _unrotated(layers: list[bool]) -> dict[str, Any]:
    return {"no_rope_freq": [int(is_unrotated) for is_unrotated in layers]} if any(layers) else {}
