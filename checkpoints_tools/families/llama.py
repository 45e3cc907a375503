"""Llama 2, 3, 3.1, 3.2, 3.3, and SmolLM2; biases where `attention_bias` and `mlp_bias` say so."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | biases_by_keys(values)


LLAMA = Family(
    "llama",
    bridge_provider="CodeLlama|Llama(2|3|31|32)?",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
)
