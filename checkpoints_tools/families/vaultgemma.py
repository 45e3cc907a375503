"""VaultGemma: Gemma 2 with norms before attention and MLP only."""

from dataclasses import replace
from typing import Any

from checkpoints_tools.families.gemma2 import GEMMA2
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return GEMMA2.arguments(values) | {"norm_placement": "before"}


VAULTGEMMA = replace(GEMMA2, model_type="vaultgemma", bridge_provider=None, arguments=_arguments)
