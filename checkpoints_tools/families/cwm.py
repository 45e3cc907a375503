"""Code World Model: Llama with a sliding window in the layers that `layer_types` says."""

from typing import Any

from checkpoints_tools.families.arguments import bias_arguments, decoder_arguments
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    biases = bias_arguments(query_key_value=False, output=False, mlp=values.boolean("mlp_bias"))
    return decoder_arguments(values) | biases


CWM = Family("cwm", arguments=_arguments, neutral=neutral_but("mlp_bias"), windows=IN_SOME_LAYERS)
