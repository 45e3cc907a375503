"""Granite 3: multipliers of embedding, attention scores, residual sums and logits."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def multipliers(values: CheckedValues) -> dict[str, Any]:
    """Of all Granite models."""
    return {
        "embedding_multiplier": float(values.number("embedding_multiplier")),
        "softmax_scale": float(values.number("attention_multiplier")),
        "residual_multiplier": float(values.number("residual_multiplier")),
        "logits_multiplier": 1.0 / values.number("logits_scaling"),
    }


def granite_arguments(values: CheckedValues) -> dict[str, Any]:
    """Also of what was made of Granite 3."""
    return decoder_arguments(values) | biases_by_keys(values) | multipliers(values)


GRANITE = Family("granite", arguments=granite_arguments, neutral=neutral_but("attention_bias", "mlp_bias"))
