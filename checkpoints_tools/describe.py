"""Add star_checkpoint.json and the tokenizer to a checkpoint that Megatron-LM or Megatron Bridge saved.

python -m checkpoints_tools.describe DIR --hf-config HF_DIR
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.safe_globals import register_safe_globals

import megatron_star
from checkpoints_tools.command_line import command_parser, run_command
from checkpoints_tools.families import Chunk, chunks
from checkpoints_tools.hf_config import family_of, model_arguments, read_hf_config
from checkpoints_tools.output import copy_tokenizer
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.model.checkpoint import (
    DESCRIPTION_FILE,
    DTYPES,
    FORMAT_VERSION,
    TOKENIZER_DIRECTORY,
    CheckpointInfo,
    read_checkpoint_info,
    weights_directory,
    without_torch_warnings,
)

_BRIDGE_FILE = "run_config.yaml"
# Megatron Bridge uses the names of TransformerConfig and GPTModel.
_BRIDGE_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
}
# What decides the result and may differ between models whose tensors have the same shapes.
_COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "norm_epsilon",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "num_experts",
    "moe_router_topk",
    "moe_router_pre_softmax",
)
_ONLY_WITH = {
    "rope_scaling_factor": "use_rope_scaling",
    "moe_router_topk": "num_experts",
    "moe_router_pre_softmax": "num_experts",
}


def describe(directory: Path, hf_config: Path | None) -> CheckpointInfo:
    """What the checkpoint is: from its own description, else from `hf_config`, a Hugging Face directory.

    Raises:
        ValueError: `hf_config` is needed and not given, or says something else than the checkpoint does.
    """
    if hf_config is None:
        if not (directory / DESCRIPTION_FILE).is_file():
            weights = weights_directory(directory)
            raise ValueError(
                f"{directory}: it does not say {_missing(recorded_arguments(weights))}; "
                "give a Hugging Face directory of the same model with --hf-config"
            )
        return read_checkpoint_info(directory)
    config = read_hf_config(hf_config)
    model_args = model_arguments(config)
    weights = weights_directory(directory)
    _check_agreement(directory, recorded_arguments(weights), model_args)
    pieces = list(chunks(family_of(config), model_args))
    dtype = stored_dtype(MegatronWeights(weights), pieces)
    return CheckpointInfo(directory, model_args, family_of(config), dtype, hf_config)


def recorded_arguments(weights: Path) -> dict[str, Any]:
    """What Megatron-LM (`args`) or Megatron Bridge (`run_config.yaml`) recorded, in Megatron-LM's names."""
    bridge = next(
        (path for path in (weights / _BRIDGE_FILE, weights.parent / _BRIDGE_FILE) if path.is_file()), None
    )
    if bridge:
        return _bridge_arguments(bridge)
    register_safe_globals()
    with without_torch_warnings():
        args = load_common_state_dict(str(weights)).get("args", Namespace())
    return dict(vars(args))


def _bridge_arguments(path: Path) -> dict[str, Any]:
    try:
        model = yaml.safe_load(path.read_text())["model"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    recorded = {_BRIDGE_NAMES.get(name, name): value for name, value in model.items()}
    if "share_embeddings_and_output_weights" in model:
        recorded["untie_embeddings_and_output_weights"] = not model["share_embeddings_and_output_weights"]
    return recorded


def _missing(recorded: Mapping[str, Any]) -> str:
    missing = [name for name in _COMPARED if name not in recorded and _has_effect(name, recorded)]
    return ", ".join(["the family", "the tokenizer", *missing])


def _has_effect(name: str, args: Mapping[str, Any]) -> bool:
    return name not in _ONLY_WITH or bool(args.get(_ONLY_WITH[name]))


def _check_agreement(directory: Path, recorded: Mapping[str, Any], model_args: Mapping[str, Any]) -> None:
    for name in _COMPARED:
        if recorded.get(name) is None or not _has_effect(name, model_args):
            continue
        found, expected = recorded[name], model_args.get(name)
        if name == "num_query_groups" and not recorded.get("group_query_attention", True):
            found = recorded["num_attention_heads"]
        if found != expected:
            raise ValueError(
                f"{directory}: {name} is {found!r} in the checkpoint, {expected!r} in --hf-config"
            )


def stored_dtype(weights: MegatronWeights, pieces: list[Chunk]) -> torch.dtype:
    """The dtype of all weights.

    Raises:
        ValueError: there are several, or one that is not supported; or a tensor is missing.
    """
    first = weights.stored(pieces[0])[1].properties.dtype
    for piece in pieces:
        key, stored = weights.stored(piece)
        if stored.properties.dtype != first or first not in DTYPES.values():
            raise ValueError(
                f"{weights.directory}: {key} has dtype {stored.properties.dtype}, others {first}"
            )
    return first


def write_description(directory: Path, info: CheckpointInfo, *, source: Path, hashes: dict[str, str]) -> None:
    """Write the description of the checkpoint in `directory`, as `read_checkpoint_info` reads it."""
    description = {
        "format_version": FORMAT_VERSION,
        "tool": f"megatron-star {megatron_star.__version__}",
        "source": str(source.absolute()),
        "family": info.family,
        "dtype": next(name for name, value in DTYPES.items() if value == info.dtype),
        "hashes": hashes,
        "megatron_args": dict(info.args),
    }
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def add_description(directory: Path, hf_config: Path) -> None:
    """Write the description and copy the tokenizer into the checkpoint."""
    info = describe(directory, hf_config)
    copy_tokenizer(hf_config, directory / TOKENIZER_DIRECTORY)
    write_description(directory, info, source=hf_config, hashes={})


def main() -> None:
    parser = command_parser("describe", __doc__.splitlines()[0])
    parser.add_argument("megatron", type=Path, help="checkpoint of Megatron-LM or Megatron Bridge")
    parser.add_argument(
        "--hf-config", type=Path, required=True, help="Hugging Face directory: configuration, tokenizer"
    )
    options = parser.parse_args()
    add_description(options.megatron, options.hf_config)
    print(f"{options.megatron / DESCRIPTION_FILE} written")


if __name__ == "__main__":
    run_command(main)
