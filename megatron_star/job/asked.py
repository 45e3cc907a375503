"""What was asked, as it is written beside an answer: a later run goes on with the same questions only."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from megatron_star.model.checkpoint import (
    DESCRIPTION_FILE,
    CheckpointInfo,
    read_checkpoint_info,
    weights_directory,
)

NUM_PIECES, PIECE_BYTES = 64, 4096


def of_model(args: argparse.Namespace) -> dict[str, Any]:
    """Which model answers, in which precision; raises ValueError or OSError if there is none at `--load`.

    Contexts as they are computed are left out, as in answers from before there were others.
    """
    info = read_checkpoint_info(args.load)
    asked = {
        "model": info.directory.resolve().name,
        "checkpoint": fingerprint(info),
        "dtype": str(args.dtype or info.dtype).removeprefix("torch."),
    }
    return asked if args.kv_dtype == "auto" else asked | {"kv_dtype": args.kv_dtype}


def of_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """On how many ranks: for what is compared by its time.

    Sizes of experts' groups that nobody chose are left out, as in answers from before there were any.
    """
    sizes = {
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "context_parallel_size": args.context_parallel_size,
    }
    if args.expert_model_parallel_size > 1:
        sizes["expert_model_parallel_size"] = args.expert_model_parallel_size
    if args.expert_tensor_parallel_size is not None:
        sizes["expert_tensor_parallel_size"] = args.expert_tensor_parallel_size
    return sizes


def of_text(text: str) -> str:
    """A hash of a text that may be long."""
    return _short(hashlib.sha256(text.encode()))


def of_tokens(token_ids: list[int]) -> str:
    """A hash of tokens."""
    return _short(hashlib.sha256(repr(token_ids).encode()))


def fingerprint(info: CheckpointInfo) -> str:
    """Of a checkpoint: its description, its tokenizer, and pieces from all over its weights.

    Two sets of weights that differ in a few places only may have the same; a fine-tuned model has another.
    """
    digest = hashlib.sha256((info.directory / DESCRIPTION_FILE).read_bytes())
    for path in sorted(info.tokenizer_directory.glob("*")):
        if path.is_file():
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    for path in sorted(weights_directory(info.directory).glob("*.distcp")):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode() + _pieces(path))
    return _short(digest)


def _pieces(path: Path) -> bytes:
    step = max(PIECE_BYTES, path.stat().st_size // NUM_PIECES)
    with open(path, "rb", buffering=0) as file:
        return b"".join(_piece(file, start) for start in range(0, path.stat().st_size, step))


def _piece(file: Any, start: int) -> bytes:
    file.seek(start)
    return file.read(PIECE_BYTES)


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]
