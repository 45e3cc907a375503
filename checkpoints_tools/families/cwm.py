"""Code World Model: Llama with a sliding window in the layers that `layer_types` says."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return decoder_arguments(values) | biases_by_keys(values)


CWM = Family("cwm", arguments=_arguments, neutral=neutral_but("mlp_bias"), windows=IN_SOME_LAYERS)
