"""SmolLM3: layers without rotary embedding, which may have a sliding window."""

from typing import Any

from checkpoints_tools.families.arguments import bias_arguments, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    if "sliding_attention" in values.any("layer_types") and not values.boolean("use_sliding_window"):
        # transformers' masks have a window then, but not what it tells FlashAttention.
        raise values.wrong("use_sliding_window", "true, where layer_types has 'sliding_attention'")
    of_attention = values.boolean("attention_bias")
    biases = bias_arguments(query_key_value=of_attention, output=of_attention, mlp=values.boolean("mlp_bias"))
    return decoder_arguments(values) | biases | _unrotated_layers(values)


def _unrotated_layers(values: CheckedValues) -> dict[str, Any]:
    """Of transformers 1 means that a layer is rotated, of Megatron that it is not."""
    rotated = values.flags("no_rope_layers", values.integer("num_hidden_layers"))
    return {} if all(rotated) else {"no_rope_freq": [1 - has_rope for has_rope in rotated]}


SMOLLM3 = Family(
    "smollm3",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
    windows=IN_SOME_LAYERS,
)
