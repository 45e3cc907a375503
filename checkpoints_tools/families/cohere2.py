"""Command R7B and Command A: Command R with windows, and no rotary embedding in its full layers."""

from typing import Any

from checkpoints_tools.families.cohere import cohere_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.layer_kinds import unrotated_full_layers
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return cohere_arguments(values) | unrotated_full_layers(values)


COHERE2 = Family(
    "cohere2",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "hidden_act"),
    windows=IN_SOME_LAYERS,
)
