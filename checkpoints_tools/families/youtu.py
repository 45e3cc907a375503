"""Youtu-LLM: DeepSeek V3's attention with a dense MLP in all layers."""

from typing import Any

from checkpoints_tools.families.family import Family
from checkpoints_tools.families.latent_attention import LATENT_ATTENTION, latent_attention_arguments
from checkpoints_tools.families.weights import DENSE_MLP
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return latent_attention_arguments(values, rotary_interleaved=values.boolean("rope_interleave"))


YOUTU = Family("youtu", arguments=_arguments, layer=(*LATENT_ATTENTION, *DENSE_MLP))
