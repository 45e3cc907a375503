"""Convert a Megatron checkpoint to Hugging Face, in the memory of a few tensors.

python -m checkpoints_tools.convert_megatron_to_hf --megatron DIR --output DIR [--hf-config DIR]
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoints_tools.casting import cast
from checkpoints_tools.chunks import Chunk, chunks
from checkpoints_tools.command_line import (
    add_dtype_option,
    command_parser,
    dtype_option,
    progress_bar,
    run_command,
)
from checkpoints_tools.describe import describe
from checkpoints_tools.families import family_named
from checkpoints_tools.hf_config import model_arguments, read_hf_config, read_whole_config
from checkpoints_tools.layouts import heads_of, split
from checkpoints_tools.multimodal import PREDICTION_LAYERS
from checkpoints_tools.output import check_can_write, new_directory
from checkpoints_tools.safetensors_output import Written, write_hf_weights
from checkpoints_tools.tokenizer_files import copy_tokenizer
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.model.checkpoint import DTYPES, weights_directory
from megatron_star.model.weight_hashes import WHOLE, checked_beside


def convert(
    megatron: Path,
    output: Path,
    *,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    verify_weights: bool = True,
    fused_experts: bool = False,
) -> None:
    """Convert `megatron` to `output`.

    Args:
        hf_config: a Hugging Face directory of the same model, for a checkpoint without star_checkpoint.json.
        dtype: of the result; None keeps that of the checkpoint.
        verify_weights: compare the files of the weights with their hashes while they are read.
        fused_experts: all experts of a layer are written as one tensor, where the family has one for them.
    """
    inputs = [megatron, *([hf_config] if hf_config else [])]
    check_can_write(output, inputs=inputs, force=force)
    info = describe(megatron, hf_config)
    share = WHOLE if verify_weights else None
    with checked_beside(info.directory, info.weight_files, share) as wait_for_hashes:
        weights = MegatronWeights(weights_directory(info.directory))
        pieces = weights.check(chunks(family_named(info.family), info.args))
        groups = _groups(weights, pieces, dtype or info.dtype, fused_experts)
        num_bytes = sum(piece.num_elements for piece in pieces) * (dtype or info.dtype).itemsize
        with (
            new_directory(output, inputs=inputs, force=force, num_bytes=num_bytes) as temporary,
            progress_bar(num_bytes, "converting") as bar,
        ):
            write_hf_weights(temporary, groups, _cast(hf_tensors(weights, pieces, info.args, bar), groups))
            copy_tokenizer(info.tokenizer_directory, temporary)
            _write_config(temporary, info.args, dtype or info.dtype)
            wait_for_hashes()


def _groups(
    weights: MegatronWeights, pieces: list[Chunk], dtype: torch.dtype, fused_experts: bool
) -> list[list[Written]]:
    """Of each piece the tensors that it is written to."""
    groups = []
    for piece in pieces:
        found = piece.dtype(weights.stored(piece)[1].properties.dtype, dtype)
        names_and_shapes = (source.written(fused_experts=fused_experts) for source in piece.sources)
        groups.append([Written(*each, found) for each in names_and_shapes])
    return groups


def hf_tensors(
    weights: MegatronWeights, pieces: list[Chunk], args: Mapping[str, Any], bar: Any
) -> Iterator[list[Tensor]]:
    """The Hugging Face tensors of each piece, in the dtype in which they are stored."""
    for piece in pieces:
        fused = weights.read(piece)
        bar.update(piece.num_elements * fused.dtype.itemsize)
        yield split(piece.layout, fused, [source.shape for source in piece.sources], heads_of(args))


def _cast(values: Iterable[list[Tensor]], groups: list[list[Written]]) -> Iterator[list[Tensor]]:
    for tensors, group in zip(values, groups, strict=True):
        yield [cast(tensor, to.dtype, to.name) for tensor, to in zip(tensors, group, strict=True)]


def _write_config(directory: Path, args: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Make config.json name the weights' dtype and whether they are tied; leave it as it is if it does.

    What was quantised no longer is, what was multimodal is the language model alone, and there are no layers
    that predict several tokens.
    """
    whole, config = read_whole_config(directory), read_hf_config(directory)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    changed = {name: value for name, value in config.items() if name != "quantization_config"}
    changed |= {key: next(name for name, value in DTYPES.items() if value == dtype)}
    tied = not args["untie_embeddings_and_output_weights"]
    if model_arguments(config)["untie_embeddings_and_output_weights"] == tied:
        changed["tie_word_embeddings"] = tied
    if config is not whole:
        changed["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    if family_named(config["model_type"]).has_prediction_layers and changed.get(PREDICTION_LAYERS):
        changed[PREDICTION_LAYERS] = 0
    if changed != whole:
        (directory / "config.json").write_text(json.dumps(changed, indent=2) + "\n")


def main() -> None:
    parser = command_parser("convert_megatron_to_hf", __doc__.splitlines()[0])
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--hf-config", type=Path, help="Hugging Face directory of the same model")
    add_dtype_option(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace an existing output, if it is a checkpoint of ours"
    )
    parser.add_argument(
        "--no-verify-weights", action="store_true", help="do not compare the weights with their hashes"
    )
    parser.add_argument(
        "--fused-experts",
        action="store_true",
        help="write all experts of a layer as one tensor, as transformers 5 has them in memory",
    )
    options = parser.parse_args()
    convert(
        options.megatron,
        options.output,
        hf_config=options.hf_config,
        dtype=dtype_option(options),
        force=options.force,
        verify_weights=not options.no_verify_weights,
        fused_experts=options.fused_experts,
    )
    print(f"{options.output} written")


if __name__ == "__main__":
    run_command(main)
