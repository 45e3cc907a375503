"""Qwen3: norms of query and key."""

from typing import Any

from checkpoints_tools.families.arguments import bias_arguments, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    has_biases = values.boolean("attention_bias")
    biases = bias_arguments(query_key_value=has_biases, output=has_biases, mlp=False)
    return decoder_arguments(values) | biases | {"qk_layernorm": True}


QWEN3 = Family(
    "qwen3",
    bridge_provider="Qwen3",
    arguments=_arguments,
    neutral=neutral_but("attention_bias"),
    windows=IN_SOME_LAYERS,
)
