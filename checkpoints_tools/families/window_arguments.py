"""Which layers of a resolved Hugging Face configuration see only a window, in Megatron's argument names."""

from typing import Any

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues

_KINDS = ("full_attention", "sliding_attention")


def window_arguments(
    family: Family, values: CheckedValues, *, num_layers: int, max_position_embeddings: int
) -> dict[str, Any]:
    """`window_size` and `window_attn_skip_freq`; nothing where no layer has a window.

    A window that is as long as the contexts that the model is made for is none.

    Raises:
        ValueError: a layer is of another kind, the size of the window is none, or the family has no windows.
    """
    windowed = _windowed_layers(family, values, num_layers)
    if not any(windowed) or values.integer("sliding_window") >= max_position_embeddings:
        return {}
    if family.windows is None:
        found = values.any("sliding_window")
        raise ValueError(f"config.json: sliding_window={found} is not supported for {family.model_type}")
    return {
        # Megatron: how many tokens before and after its own a token sees. transformers: how many in all.
        "window_size": [values.integer("sliding_window") - 1, 0],
        "window_attn_skip_freq": [int(has_window) for has_window in windowed],
    }


def _windowed_layers(family: Family, values: CheckedValues, num_layers: int) -> list[bool]:
    kinds = values.any("layer_types", None) if family.windows == IN_SOME_LAYERS else None
    if kinds is None:
        return [values.any("sliding_window", None) is not None] * num_layers
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"config.json: layer_types has {shown(kind)}, which is not supported")
    return [kind == "sliding_attention" for kind in kinds]
