"""Checkpoints as this project stores them, and what they say of their model.

    DIR/latest_checkpointed_iteration.txt, DIR/release/   as Megatron's own load_checkpoint reads them
    DIR/star_checkpoint.json                              the model in Megatron's argument names
    DIR/tokenizer/                                        tokenizer, config.json, generation_config.json

The JSON file is the only description that is read here; the `args` pickled beside the weights are
for Megatron.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_star.checked_input import read_json_object, shown
from megatron_star.model.checked_values import CheckedValues
from megatron_star.model.recorded_arguments import check_arguments
from megatron_star.model.weight_hashes import WeightFiles, check_record

DESCRIPTION_FILE = "star_checkpoint.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
TOKENIZER_DIRECTORY = "tokenizer"
FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NOT_DESCRIBED = """it holds Megatron weights but no star_checkpoint.json; add one with \
`python -m checkpoints_tools.describe {0} --hf-config DIR`"""
_NOT_CONVERTED = """it is a Hugging Face checkpoint; convert it with \
`python -m checkpoints_tools.convert_hf_to_megatron --hf {0} --output DIR`"""
_CONVERT_AGAIN = "; convert the checkpoint again"
_LEGACY_FORMAT = "save it with Megatron's `--ckpt-convert-format torch_dist`"


@dataclass(frozen=True)
class CheckpointInfo:
    """What `star_checkpoint.json` says.

    Attributes:
        args: the model in the names of Megatron-LM's command line (`architecture.py`), and `vocab_size`,
            the number of real tokens; logits beyond it belong to padding.
        family: the Hugging Face model type, such as `llama`.
        dtype: of the stored weights.
        weight_files: sizes and hashes of the files of the weights; empty where nobody has written them down.
    """

    directory: Path
    args: Mapping[str, Any]
    family: str
    dtype: torch.dtype
    tokenizer_directory: Path
    weight_files: WeightFiles = field(default_factory=dict)


def read_checkpoint_info(load: str | Path) -> CheckpointInfo:
    """Read the description of a checkpoint.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `load`.
        ValueError: its description cannot be used.
    """
    directory = Path(load)
    path = directory / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: {_why_not_described(directory)}")
    weights_directory(directory)
    description = CheckedValues(read_json_object(path, _CONVERT_AGAIN), path)
    version = description.any("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {shown(version)}, this program reads {FORMAT_VERSION}")
    args, family, dtype = (description.any(name) for name in ("megatron_args", "family", "dtype"))
    if not isinstance(args, dict):
        raise description.wrong("megatron_args", "an object")
    check_arguments(args, path)
    if not isinstance(family, str):
        raise description.wrong("family", "a text")
    description.one_of("dtype", tuple(DTYPES))
    return CheckpointInfo(
        directory,
        args,
        family,
        DTYPES[dtype],
        directory / TOKENIZER_DIRECTORY,
        _weight_files(description, path),
    )


def _weight_files(description: CheckedValues, path: Path) -> WeightFiles:
    """Checkpoints of other programs, and those of our first versions, have no such record."""
    files = description.any("weight_files", None)
    if files is None:
        return {}
    hashes = description.any("hashes", None)
    check_record(files, hashes.get("weights") if isinstance(hashes, dict) else None, path)
    return files


def _why_not_described(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    if (directory / TRACKER_FILE).is_file() or next(directory.glob("iter_*"), None):
        return _NOT_DESCRIBED.format(directory)
    if (directory / "config.json").is_file():
        return _NOT_CONVERTED.format(directory)
    return f"not a checkpoint: neither {DESCRIPTION_FILE} nor {TRACKER_FILE} in it"


def weights_directory(directory: str | Path) -> Path:
    """The folder of the torch_dist files that Megatron's tracker file points to.

    Raises:
        FileNotFoundError: the tracker file or the folder is missing, or the folder is not complete.
        ValueError: the tracker file holds neither a number nor `release`.
    """
    weights = _tracked_directory(Path(directory))
    if next(weights.glob("mp_rank_*"), None):
        raise ValueError(f"{weights}: {_LEGACY_FORMAT}")
    for name in ("metadata.json", ".metadata"):
        if not (weights / name).is_file():
            raise FileNotFoundError(f"{weights / name}: no such file; not a complete torch_dist checkpoint")
    backend = read_json_object(weights / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(f"{weights}: the format {backend!r} is not supported; {_LEGACY_FORMAT}")
    return weights


def _tracked_directory(directory: Path) -> Path:
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():
        iterations = sorted(directory.glob("iter_*"))
        if len(iterations) == 1:  # Megatron Bridge may track its checkpoints in another file
            return iterations[0]
        raise FileNotFoundError(f"{tracker}: no such file; is {directory} a Megatron checkpoint?")
    iteration = tracker.read_text("utf-8", errors="replace").strip()
    if iteration != "release" and not re.fullmatch("[0-9]{1,18}", iteration):
        raise ValueError(f"{tracker}: {shown(iteration)} is neither an iteration nor `release`")
    return directory / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
