"""Whether a directory holds a checkpoint that this project wrote, and nothing else."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints_tools.safetensors_header import TOOL_KEY, read_metadata
from megatron_star.checked_input import read_json_object
from megatron_star.model.checkpoint import DESCRIPTION_FILE, TOKENIZER_DIRECTORY, TRACKER_FILE

_WEIGHTS = "release"
_WEIGHT_FILES = re.compile(r"\.metadata|metadata\.json|__\d+_\d+\.distcp")
_HF_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_HF_FILES = re.compile(
    r"model\.safetensors\.index\.json|config\.json|generation_config\.json|tokenizer[\w.-]*|vocab[\w.-]*|merges\.txt"
    r"|[\w.-]+\.tiktoken|special_tokens_map\.json|added_tokens\.json|chat_template[\w.-]*"
)


def what_is_not_ours(directory: Path) -> str | None:
    """Why the directory may not be replaced; None if all in it is ours, or nothing is in it."""
    if not directory.is_dir():
        return "it is not a directory"
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return None
    if DESCRIPTION_FILE in names:
        return _of_megatron(directory, names)
    return _of_hugging_face(directory, names)


def _of_megatron(directory: Path, names: Iterable[str]) -> str | None:
    try:
        hashes = read_json_object(directory / DESCRIPTION_FILE).get("hashes")
    except (ValueError, OSError) as error:
        return f"{DESCRIPTION_FILE} cannot be read ({error})"
    if not isinstance(hashes, dict) or "weights" not in hashes:
        return f"its {DESCRIPTION_FILE} describes weights that another program has written"
    for name in names:
        if name not in (DESCRIPTION_FILE, TRACKER_FILE, _WEIGHTS, TOKENIZER_DIRECTORY):
            return f"{name} in it is not ours"
    return _first_other(directory / _WEIGHTS, _WEIGHT_FILES.fullmatch) or _first_other(
        directory / TOKENIZER_DIRECTORY, hashes.__contains__
    )


def _first_other(directory: Path, is_ours: Any) -> str | None:
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_symlink() or not path.is_file() or not is_ours(path.name):
            return f"{directory.name}/{path.name} in it is not ours"
    return None


def _of_hugging_face(directory: Path, names: Iterable[str]) -> str | None:
    weights = [name for name in names if _HF_WEIGHTS.fullmatch(name)]
    if not weights:
        return "it is not a checkpoint of ours"
    for name in names:
        path = directory / name
        if path.is_symlink() or not path.is_file():
            return f"{name} in it is not ours"
        if name in weights and TOOL_KEY not in read_metadata(path):
            return f"{name} in it was written by another program"
        if name not in weights and not _HF_FILES.fullmatch(name):
            return f"{name} in it is not ours"
    return None
