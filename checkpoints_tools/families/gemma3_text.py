"""Gemma 3: as Gemma 2 without a soft cap of attention, with norms of query and key, and two rotary bases."""

from typing import Any

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family
from checkpoints_tools.families.gemma2 import GEMMA_LAYER, GEMMA_NEUTRAL, gemma_arguments
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return gemma_arguments(values) | {"qk_layernorm": True}


GEMMA3_TEXT = Family(
    "gemma3_text",
    arguments=_arguments,
    # transformers' attention of Gemma 3 has a soft cap, and does not use it.
    neutral=GEMMA_NEUTRAL | {"attn_logit_softcapping": (None,)},
    windows=IN_SOME_LAYERS,
    layer=GEMMA_LAYER,
)
