"""Qwen2 and Qwen2.5: biases of query, key and value."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | {"add_qkv_bias": True}


QWEN2 = Family(
    "qwen2",
    bridge_provider="Qwen(2|25)",
    arguments=_arguments,
    # Its layers have biases where Megatron has them, and read no such key.
    neutral=neutral_but("attention_bias"),
    windows=IN_SOME_LAYERS,
)
