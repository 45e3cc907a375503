"""Seed-OSS: biases of query, key and value; the attention's output has one of its own, or none."""

from typing import Any

from checkpoints_tools.families.arguments import bias_arguments, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | bias_arguments(
        query_key_value=values.boolean("attention_bias"),
        output=values.boolean("attention_out_bias"),
        mlp=values.boolean("mlp_bias"),
    )


SEED_OSS = Family(
    "seed_oss",
    bridge_provider="SeedOss",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
)
