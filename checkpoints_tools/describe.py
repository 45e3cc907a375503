"""Add star_checkpoint.json and the tokenizer to a checkpoint that Megatron-LM or Megatron Bridge saved.

python -m checkpoints_tools.describe DIR --hf-config HF_DIR
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

import megatron_star
from checkpoints_tools.chunks import Chunk, chunks
from checkpoints_tools.command_line import command_parser, run_command
from checkpoints_tools.families import family_named
from checkpoints_tools.hf_config import model_arguments, read_hf_config
from checkpoints_tools.recorded_by_megatron import check_agreement, recorded_arguments, what_is_missing
from checkpoints_tools.tokenizer_files import check_tokenizer, copy_tokenizer
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.checked_input import read_json_object
from megatron_star.model.checkpoint import (
    DESCRIPTION_FILE,
    DTYPES,
    FORMAT_VERSION,
    TOKENIZER_DIRECTORY,
    CheckpointInfo,
    read_checkpoint_info,
    weights_directory,
)
from megatron_star.model.weight_hashes import root_hash


def describe(directory: Path, hf_config: Path | None) -> CheckpointInfo:
    """What the checkpoint is: from its own description, else from `hf_config`, a Hugging Face directory.

    Raises:
        ValueError: `hf_config` is needed and not given, or says something else than the checkpoint does.
    """
    if hf_config is None:
        if not (directory / DESCRIPTION_FILE).is_file():
            weights = weights_directory(directory)
            raise ValueError(
                f"{directory}: it does not say {what_is_missing(recorded_arguments(weights))}; "
                "give a Hugging Face directory of the same model with --hf-config"
            )
        info = read_checkpoint_info(directory)
        family_named(info.family)
        return info
    config = read_hf_config(hf_config)
    model_args = model_arguments(config)
    family = family_named(config["model_type"])
    weights = weights_directory(directory)
    check_agreement(directory, recorded_arguments(weights), model_args)
    stored = MegatronWeights(weights)
    dtype = stored_dtype(stored, stored.check(chunks(family, model_args)))
    return CheckpointInfo(directory, model_args, family.model_type, dtype, hf_config)


def stored_dtype(weights: MegatronWeights, pieces: list[Chunk]) -> torch.dtype:
    """The dtype of all weights but those that may be float32.

    Raises:
        ValueError: there are several, or one that is not supported; or a tensor is missing.
    """
    first = weights.stored(pieces[0])[1].properties.dtype
    for piece in pieces:
        key, stored = weights.stored(piece)
        expected = piece.dtype(stored.properties.dtype, first)
        if stored.properties.dtype != expected or first not in DTYPES.values():
            raise ValueError(
                f"{weights.directory}: {key} has dtype {stored.properties.dtype}, others {first}"
            )
    return first


def write_description(directory: Path, info: CheckpointInfo, *, source: Path, hashes: dict[str, str]) -> None:
    """Write the description of the checkpoint in `directory`, as `read_checkpoint_info` reads it.

    Args:
        hashes: of the other files; that of the weights follows from `info.weight_files`.
    """
    if info.weight_files:
        hashes = {"weights": root_hash(info.weight_files), **hashes}
    description = {
        "format_version": FORMAT_VERSION,
        "tool": f"megatron-star {megatron_star.__version__}",
        "source": str(source.absolute()),
        "family": info.family,
        "dtype": next(name for name, value in DTYPES.items() if value == info.dtype),
        "hashes": hashes,
        "megatron_args": dict(info.args),
    }
    if info.weight_files:
        description["weight_files"] = info.weight_files
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def add_description(
    directory: Path, hf_config: Path, *, force: bool = False, with_tokenizer: bool = True
) -> None:
    """Write the description and copy the tokenizer into the checkpoint.

    Args:
        force: replace a description, and the tokenizer that came with it.
        with_tokenizer: refuse a tokenizer that cannot be loaded.

    Raises:
        ValueError: there is one already, and not `force`; or what is there is not of this command.
    """
    _check_can_add(directory, force=force)
    info = describe(directory, hf_config)
    temporary = Path(tempfile.mkdtemp(prefix=f".{TOKENIZER_DIRECTORY}.partial-", dir=directory))
    try:
        temporary.chmod(0o755)
        copy_tokenizer(hf_config, temporary)
        check_tokenizer(hf_config, temporary, wanted=with_tokenizer)
        if (directory / TOKENIZER_DIRECTORY).exists():
            shutil.rmtree(directory / TOKENIZER_DIRECTORY)
        temporary.rename(directory / TOKENIZER_DIRECTORY)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    write_description(directory, info, source=hf_config, hashes={})


def _check_can_add(directory: Path, *, force: bool) -> None:
    path, tokenizer = directory / DESCRIPTION_FILE, directory / TOKENIZER_DIRECTORY
    if path.is_file():
        if "weights" in (read_json_object(path).get("hashes") or {}):
            raise ValueError(f"{path}: the checkpoint was converted, and needs no other description")
        if not force:
            raise ValueError(f"{path} exists; --force replaces it")
    elif tokenizer.exists():
        raise ValueError(f"{tokenizer} exists and is not ours; give it another name")


def main() -> None:
    parser = command_parser("describe", __doc__.splitlines()[0])
    parser.add_argument("megatron", type=Path, help="checkpoint of Megatron-LM or Megatron Bridge")
    parser.add_argument(
        "--hf-config", type=Path, required=True, help="Hugging Face directory: configuration, tokenizer"
    )
    parser.add_argument("--force", action="store_true", help="replace a description of this command")
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="describe although the tokenizer cannot be loaded"
    )
    options = parser.parse_args()
    add_description(
        options.megatron, options.hf_config, force=options.force, with_tokenizer=not options.no_tokenizer
    )
    print(f"{options.megatron / DESCRIPTION_FILE} written")


if __name__ == "__main__":
    run_command(main)
