"""Convert a Hugging Face checkpoint to Megatron, in the memory of a few tensors.

python -m checkpoints_tools.convert_hf_to_megatron --hf DIR --output DIR [--dtype bf16]
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.command_line import (
    add_dtype_option,
    command_parser,
    dtype_option,
    progress_bar,
    run_command,
)
from checkpoints_tools.describe import write_description
from checkpoints_tools.families import Chunk, chunks
from checkpoints_tools.hf_config import family_of, model_arguments, read_hf_config
from checkpoints_tools.layouts import fuse
from checkpoints_tools.megatron_args import args_for_megatron
from checkpoints_tools.output import copy_tokenizer, new_directory
from checkpoints_tools.safetensors_files import DTYPES_IN_FILES, HfWeights
from checkpoints_tools.torch_dist import write_weights
from megatron_star.model.checkpoint import TOKENIZER_DIRECTORY, TRACKER_FILE, CheckpointInfo


def convert(hf: Path, output: Path, *, dtype: torch.dtype | None = None, force: bool = False) -> None:
    """Convert `hf` to `output`.

    Args:
        dtype: of the result; None keeps that of the checkpoint.

    Raises:
        ValueError, FileNotFoundError: the checkpoint cannot be converted, or `output` not be written.
    """
    config = read_hf_config(hf)
    family, model_args = family_of(config), model_arguments(config)
    weights = HfWeights(hf)
    pieces = list(chunks(family, model_args))
    check_names_and_shapes(weights, pieces, model_args)
    dtype = dtype or common_dtype(weights, pieces)
    num_bytes = sum(piece.num_elements for piece in pieces) * dtype.itemsize
    with new_directory(output, force=force, num_bytes=num_bytes) as temporary:
        tokenizer = copy_tokenizer(hf, temporary / TOKENIZER_DIRECTORY)
        args = args_for_megatron(model_args, output / TOKENIZER_DIRECTORY, dtype)
        with progress_bar(num_bytes, "converting") as bar:
            source = _Source(weights, dtype, model_args["num_query_groups"], bar)
            write_weights(temporary / "release", pieces, source.value_of, args, dtype)
        (temporary / TRACKER_FILE).write_text("release")
        info = CheckpointInfo(temporary, model_args, family, dtype, temporary / TOKENIZER_DIRECTORY)
        write_description(temporary, info, source=hf, hashes=source.hashes(tokenizer))


class _Source:
    """Makes Megatron's chunks from Hugging Face tensors, and hashes what it read."""

    def __init__(self, weights: HfWeights, dtype: torch.dtype, num_query_groups: int, bar: Any) -> None:
        self._weights = weights
        self._dtype = dtype
        self._num_query_groups = num_query_groups
        self._bar = bar
        self._sha256 = hashlib.sha256()

    def value_of(self, chunk: Chunk) -> Tensor:
        """The chunk's data, of its `weight_shape` and the dtype of the result."""
        parts = []
        for source in chunk.sources:
            tensor = self._weights.read(source.name)
            self._sha256.update(source.name.encode())
            self._sha256.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
            parts.append(tensor.to(self._dtype))
        value = fuse(chunk.layout, parts, chunk.weight_shape, self._num_query_groups)
        self._bar.update(value.nbytes)
        return value

    def hashes(self, files: list[Path]) -> dict[str, str]:
        """SHA-256 of the source weights, by name and value in the order of the table, and of files."""
        of_files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return {"weights": self._sha256.hexdigest(), **of_files}


def check_names_and_shapes(weights: HfWeights, pieces: list[Chunk], model_args: dict[str, Any]) -> None:
    """The tensors are those of the table, all and only, of a float type, in the shapes of config.json.

    Raises:
        ValueError: it does not.
    """
    expected = {source.name: source.shape for piece in pieces for source in piece.sources}
    for name, shape in expected.items():
        entry = weights.entries.get(name)
        if entry is None:
            raise ValueError(f"{weights.directory}: {name} is not in the checkpoint")
        if entry.shape != shape:
            raise ValueError(f"{entry.file}: {name} has shape {entry.shape}, config.json says {shape}")
        if entry.dtype not in DTYPES_IN_FILES:
            raise ValueError(
                f"{entry.file}: {name} has dtype {entry.dtype}; {', '.join(DTYPES_IN_FILES)} are supported "
                "(a quantised checkpoint must be dequantised first)"
            )
    for name in weights.entries.keys() - expected.keys():
        if not _may_be_left_out(name, model_args):
            raise ValueError(f"{weights.entries[name].file}: {name} is not a tensor of this family")


def _may_be_left_out(name: str, model_args: dict[str, Any]) -> bool:
    """A tied output layer is the embedding; rotary tables follow from the configuration."""
    tied = not model_args["untie_embeddings_and_output_weights"]
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def common_dtype(weights: HfWeights, pieces: list[Chunk]) -> torch.dtype:
    """The dtype that all tensors have.

    Raises:
        ValueError: they have several, or one that cannot be converted.
    """
    names = [source.name for piece in pieces for source in piece.sources]
    counts = Counter(weights.entries[name].dtype for name in names)
    common = counts.most_common(1)[0][0]
    for name in names:
        found = weights.entries[name].dtype
        if found != common:
            raise ValueError(
                f"{weights.entries[name].file}: {name} has dtype {found}, most tensors {common}; "
                "choose one with --dtype (float32, bfloat16 or float16)"
            )
    return DTYPES_IN_FILES[common]


def main() -> None:
    parser = command_parser("convert_hf_to_megatron", __doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    add_dtype_option(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    options = parser.parse_args()
    convert(options.hf, options.output, dtype=dtype_option(options), force=options.force)


if __name__ == "__main__":
    run_command(main)
