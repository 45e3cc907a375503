"""Write star_checkpoint.json.

python -m checkpoints_tools.describe DIR --hf-config DIR
"""

import json
from pathlib import Path
from typing import Any

import torch

import megatron_star
from megatron_star.model.checkpoint import DESCRIPTION_FILE, DTYPES, FORMAT_VERSION


def write_description(
    directory: Path,
    *,
    source: Path,
    family: str,
    dtype: torch.dtype,
    model_args: dict[str, Any],
    hashes: dict[str, str],
) -> None:
    """Write the description of the checkpoint in `directory`, as `read_checkpoint_info` reads it."""
    description = {
        "format_version": FORMAT_VERSION,
        "tool": f"megatron-star {megatron_star.__version__}",
        "source": str(source.absolute()),
        "family": family,
        "dtype": next(name for name, value in DTYPES.items() if value == dtype),
        "hashes": hashes,
        "megatron_args": model_args,
    }
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
