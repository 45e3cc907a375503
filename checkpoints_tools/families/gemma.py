"""Gemma: GELU with a gate, embeddings times the root of their size, weights of norms added to 1."""

from typing import Any

from checkpoints_tools.families.arguments import activation_arguments, biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = decoder_arguments(values)
    return {
        **arguments,
        **activation_arguments(values, gated=True),
        **biases_by_keys(values),
        "apply_layernorm_1p": True,
        "embedding_multiplier": arguments["hidden_size"] ** 0.5,
        "round_embedding_multiplier": True,
    }


GEMMA = Family(
    "gemma",
    arguments=_arguments,
    neutral={
        **neutral_but("attention_bias", "hidden_act"),
        "use_bidirectional_attention": (False, None),
    },
)
