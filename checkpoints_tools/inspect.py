"""Say what a checkpoint, Megatron or Hugging Face, holds and what it needs; reads no weights.

python -m checkpoints_tools.inspect DIR [--hf-config DIR]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.chunks import Chunk, chunks
from checkpoints_tools.command_line import command_parser, run_command
from checkpoints_tools.describe import describe
from checkpoints_tools.families import family_named
from checkpoints_tools.hf_checkpoint import common_dtype, notes, open_hf_checkpoint
from checkpoints_tools.kinds_of_layers import kinds_of_layers, positions
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.model.architecture import ModelParallelSizes, transformer_config
from megatron_star.model.checkpoint import DESCRIPTION_FILE, CheckpointInfo, weights_directory
from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.model_shape import latent_attention
from megatron_star.planning.model_size import ModelSize

_TP_SIZES = range(1, 9)
_EXPERTS, _EMBEDDING = ".experts.experts.", "embedding.word_embeddings.weight"


def inspect(directory: Path, hf_config: Path | None = None) -> str:
    """A report of some lines on the checkpoint."""
    info, pieces, not_as_they_are = _read(directory, hf_config)
    args = info.args
    parameters = sum(_num_real_elements(piece) for piece in pieces)
    lines = {
        "family": info.family,
        "dtype": str(info.dtype).removeprefix("torch."),
        "parameters": f"{parameters:,}",
        **_active(args, info.dtype, pieces),
        "layers": args["num_layers"],
        **kinds_of_layers(args, info.dtype.itemsize),
        "hidden, feed-forward size": f"{args['hidden_size']}, {args['ffn_hidden_size']}{_experts(args)}",
        "heads": _heads(args),
        "vocabulary": f"{args['vocab_size']:,} (padded to {args['padded_vocab_size']:,}), "
        f"{'untied' if args['untie_embeddings_and_output_weights'] else 'tied'} output layer",
        "positions": f"{positions(args)}, up to {args['max_position_embeddings']:,} tokens",
        "KV cache": _kv(args, info.dtype, tp_size=1),
        "Star Attention": "star, exact and neighbor blocks; shared contexts; CP x TP",
    }
    report = [f"{name:<26}{value}" for name, value in lines.items()]
    report += ["", "TP  weights per rank  KV of a rank"]
    report += [_tp_line(args, info.dtype, pieces, tp_size) for tp_size in _TP_SIZES]
    report += ["", *(f"note: {note}" for note in not_as_they_are)] if not_as_they_are else []
    return "\n".join(report)


def _read(directory: Path, hf_config: Path | None) -> tuple[CheckpointInfo, list[Chunk], list[str]]:
    """What the checkpoint is, its pieces, all of which are in it, and what is converted otherwise."""
    if (directory / "config.json").is_file() and not (directory / DESCRIPTION_FILE).is_file():
        checkpoint = open_hf_checkpoint(directory)
        dtype = common_dtype(checkpoint)
        info = CheckpointInfo(directory, checkpoint.args, checkpoint.family, dtype, directory)
        return info, checkpoint.pieces, notes(checkpoint)
    info = describe(directory, hf_config)
    weights = MegatronWeights(weights_directory(directory))
    return info, weights.check(chunks(family_named(info.family), info.args)), []


def _num_real_elements(piece: Chunk) -> int:
    return sum(torch.Size(source.shape).numel() for source in piece.sources)


def _active(args: Mapping[str, Any], dtype: torch.dtype, pieces: list[Chunk]) -> dict[str, str]:
    """Of a model of experts: what generating one token reads, without the embedding; and what experts are."""
    if not args["num_experts"]:
        return {}
    in_experts = [piece for piece in pieces if _EXPERTS in piece.key]
    of_experts = sum(map(_num_real_elements, in_experts))
    unused = of_experts - of_experts * args["moe_router_topk"] // args["num_experts"]
    if args["untie_embeddings_and_output_weights"]:
        unused += sum(_num_real_elements(piece) for piece in pieces if piece.key == _EMBEDDING)
    active = sum(map(_num_real_elements, pieces)) - unused
    num_bytes = sum(piece.num_elements for piece in in_experts) * dtype.itemsize
    return {
        "active parameters": f"{active:,} per token",
        "experts": f"{num_bytes / 1e9:.3f} GB, over expert-parallel x expert-tensor-parallel ranks",
    }


def _experts(args: Mapping[str, Any]) -> str:
    if not args["num_experts"]:
        return ""
    layers = ModelSize.of_arguments(args).num_expert_layers
    chosen, shared = args["moe_router_topk"], args.get("moe_shared_expert_intermediate_size")
    return (
        f"; {args['num_experts']} experts of {args['moe_ffn_hidden_size']}, {chosen} per token"
        + (f", {shared} of shared ones" if shared else "")
        + (f"; in {layers} of {args['num_layers']} layers" if layers < args["num_layers"] else "")
    )


def _heads(args: Mapping[str, Any]) -> str:
    if not (latent := latent_attention(ModelSize.of_arguments(args))):
        heads, groups = args["num_attention_heads"], args["num_query_groups"]
        return f"{heads} query, {groups} key-value, of {args['kv_channels']}"
    return (
        f"{latent.num_attention_heads}, of {latent.qk_head_dim} and {latent.qk_pos_emb_head_dim} rotated "
        f"(keys), {latent.v_head_dim} (values), of a latent of {latent.kv_lora_rank}"
    )


def _kv(args: Mapping[str, Any], dtype: torch.dtype, *, tp_size: int) -> str:
    """Of each token of a context, and what layers with a mask of their own keep of its end at most."""
    size = ModelSize.of_arguments(args)
    layers = kv_layers(size, tp_size=tp_size, bytes_per_value=dtype.itemsize)
    of_all = layers.num_bytes(lambda mask: 0 if mask else 1)
    of_end = layers.num_bytes(lambda mask: mask.size - 1 if mask else 0)
    rounded = ""
    if of_all and not latent_attention(size):
        in_8_bits = kv_layers(size, tp_size=tp_size, bytes_per_value=dtype.itemsize, kv_dtype="int8")
        rounded = f" ({in_8_bits.num_layers[None] * in_8_bits.of_stored(1):,} with --kv-dtype int8 or fp8)"
    return f"{of_all:,} bytes per token{rounded}" + (
        f", and at most {of_end:,} more in all" if of_end else ""
    )


def weight_bytes_per_rank(pieces: list[Chunk], dtype: torch.dtype, *, tp_size: int) -> int:
    """Bytes of weights on one tensor-parallel rank."""
    elements = sum(p.num_elements if p.split_axis is None else p.num_elements // tp_size for p in pieces)
    return elements * dtype.itemsize


def _tp_line(args: Mapping[str, Any], dtype: torch.dtype, pieces: list[Chunk], tp_size: int) -> str:
    if problem := _why_not(args, dtype, tp_size):
        return f"{tp_size:<4}no: {problem}"
    weights = weight_bytes_per_rank(pieces, dtype, tp_size=tp_size)
    return f"{tp_size:<4}{weights / 1e9:>13.3f} GB    {_kv(args, dtype, tp_size=tp_size)}"


def _why_not(args: Mapping[str, Any], dtype: torch.dtype, tp_size: int) -> str | None:
    if (args.get("moe_ffn_hidden_size") or 0) % tp_size:
        return f"moe_ffn_hidden_size {args['moe_ffn_hidden_size']} cannot be divided"
    try:
        transformer_config(args, ModelParallelSizes(tp_size), dtype=dtype, device=torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    parser = command_parser("inspect", __doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="Megatron or Hugging Face checkpoint")
    parser.add_argument("--hf-config", type=Path, help="for a checkpoint without star_checkpoint.json")
    options = parser.parse_args()
    print(inspect(options.directory, options.hf_config))


if __name__ == "__main__":
    run_command(main)
