"""SmolLM3: layers without rotary embedding, which may have a sliding window."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.layer_kinds import unrotated_layers
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    if "sliding_attention" in values.any("layer_types") and not values.boolean("use_sliding_window"):
        # transformers' masks have a window then, but not what it tells FlashAttention.
        raise values.wrong("use_sliding_window", "true, where layer_types has 'sliding_attention'")
    return decoder_arguments(values) | biases_by_keys(values) | unrotated_layers(values)


SMOLLM3 = Family(
    "smollm3",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
    windows=IN_SOME_LAYERS,
)
