"""Convert a Hugging Face checkpoint to Megatron, in the memory of a few tensors.

python -m checkpoints_tools.convert_hf_to_megatron --hf DIR --output DIR [--dtype bf16]
"""

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.casting import cast
from checkpoints_tools.chunks import Chunk
from checkpoints_tools.command_line import (
    add_dtype_option,
    command_parser,
    dtype_option,
    progress_bar,
    run_command,
)
from checkpoints_tools.describe import write_description
from checkpoints_tools.hf_checkpoint import common_dtype, notes, open_hf_checkpoint
from checkpoints_tools.layouts import Heads, fuse, heads_of
from checkpoints_tools.megatron_args import args_for_megatron
from checkpoints_tools.output import new_directory
from checkpoints_tools.safetensors_files import HfWeights
from checkpoints_tools.tokenizer_files import check_tokenizer, copy_tokenizer
from checkpoints_tools.torch_dist import write_weights
from megatron_star.model.checkpoint import TOKENIZER_DIRECTORY, TRACKER_FILE, CheckpointInfo
from megatron_star.model.weight_hashes import hash_files


def convert(
    hf: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    with_tokenizer: bool = True,
) -> None:
    """Convert `hf` to `output`.

    Args:
        dtype: of the result; None keeps that of the checkpoint.
        with_tokenizer: refuse a checkpoint whose tokenizer cannot be loaded.

    Raises:
        ValueError, FileNotFoundError: the checkpoint cannot be converted, or `output` not be written.
    """
    source = open_hf_checkpoint(hf)
    dtype = dtype or common_dtype(source)
    for note in notes(source):
        print(f"note: {note}", file=sys.stderr)
    num_bytes = sum(piece.num_elements for piece in source.pieces) * dtype.itemsize
    with new_directory(output, inputs=[hf], force=force, num_bytes=num_bytes) as temporary:
        tokenizer = copy_tokenizer(hf, temporary / TOKENIZER_DIRECTORY)
        check_tokenizer(hf, temporary / TOKENIZER_DIRECTORY, wanted=with_tokenizer)
        args = args_for_megatron(source.args, output / TOKENIZER_DIRECTORY, dtype)
        with progress_bar(num_bytes, "converting") as bar:
            dtype_of = partial(source.dtype_of, common=dtype)
            values = _Source(source.weights, dtype_of, heads_of(source.args), bar)
            write_weights(temporary / "release", source.pieces, values.value_of, args, dtype_of)
        (temporary / TRACKER_FILE).write_text("release")
        info = CheckpointInfo(
            temporary,
            source.args,
            source.family,
            dtype,
            temporary / TOKENIZER_DIRECTORY,
            _hash_weights(temporary),
        )
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizer}
        write_description(temporary, info, source=hf, hashes=hashes)


def _hash_weights(directory: Path) -> dict[str, Any]:
    files = sorted(path for path in (directory / "release").iterdir())
    with progress_bar(sum(path.stat().st_size for path in files), "hashing") as bar:
        return hash_files(directory, [f"release/{path.name}" for path in files], bar.update)


class _Source:
    """Makes Megatron's chunks from Hugging Face tensors."""

    def __init__(
        self, weights: HfWeights, dtype_of: Callable[[Chunk], torch.dtype], heads: Heads, bar: Any
    ) -> None:
        self._weights = weights
        self._dtype_of = dtype_of
        self._heads = heads
        self._bar = bar

    def value_of(self, chunk: Chunk) -> Tensor:
        """The chunk's data, of its `weight_shape` and the dtype of the result."""
        parts, dtype = [], self._dtype_of(chunk)
        for source in chunk.sources:
            parts.append(cast(self._weights.read(source.name), dtype, source.name))
        value = fuse(chunk.layout, parts, chunk.weight_shape, self._heads)
        self._bar.update(value.nbytes)
        return value


def main() -> None:
    parser = command_parser("convert_hf_to_megatron", __doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    add_dtype_option(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace an existing output, if it is a checkpoint of ours"
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="convert although the tokenizer cannot be loaded"
    )
    options = parser.parse_args()
    convert(
        options.hf,
        options.output,
        dtype=dtype_option(options),
        force=options.force,
        with_tokenizer=not options.no_tokenizer,
    )
    print(f"{options.output} written: give it to --load")


if __name__ == "__main__":
    run_command(main)
