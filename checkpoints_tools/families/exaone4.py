"""EXAONE 4: norms after attention and MLP only; beside layers with a window, full ones do not rotate."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family
from checkpoints_tools.families.layer_kinds import unrotated_full_layers
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values) | {"qk_layernorm": True, "norm_placement": "after"}
    has_windows = values.any("sliding_window") is not None
    return arguments | (unrotated_full_layers(values) if has_windows else {})


EXAONE4 = Family(
    "exaone4",
    arguments=_arguments,
    windows=IN_SOME_LAYERS,
    layer=(
        *attention(),
        *gated_mlp(),
        *norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    ),
)
