"""The models of `random_models.py` in Megatron's argument names."""

import json
from typing import Any

from random_models import CONFIGS

from checkpoints_tools.hf_config import model_arguments


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    """Of this model; with changes, of one whose config.json has these values."""
    return model_arguments(json.loads(CONFIGS[name].to_json_string()) | changes)
