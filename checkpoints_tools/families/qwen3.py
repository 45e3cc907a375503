"""Qwen3: norms of query and key."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | biases_by_keys(values) | {"qk_layernorm": True}


QWEN3 = Family(
    "qwen3",
    bridge_provider="Qwen3",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    windows=IN_SOME_LAYERS,
)
