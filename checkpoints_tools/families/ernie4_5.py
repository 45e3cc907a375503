"""ERNIE 4.5, dense: pairs of neighboring values are rotated."""

from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import Family
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    has_biases = bool(values.boolean("use_bias", None))
    return decoder_arguments(values) | {"add_bias_linear": has_biases, "rotary_interleaved": True}


ERNIE4_5 = Family("ernie4_5", bridge_provider="Ernie45", arguments=_arguments)
