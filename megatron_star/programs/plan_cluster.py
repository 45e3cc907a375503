"""Before renting GPUs: which TP x CP, sizes, memory and times to expect, and whether a model fits.

    megatron-star plan --model Llama-3.1-8B/config.json --context 128K --gpus 16 --gpu h100

Estimates from the cost model (`planning/cost_model.py`) and assumed shares of the data sheet's rates
(`planning/hardware.py`). No GPU is needed, and none is asked.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field

from checkpoints_tools.hf_config import model_arguments, read_hf_config
from megatron_star.checked_input import strict_fields, validated
from megatron_star.config import MOST_TOKENS, OPTIONS, StarConfig
from megatron_star.job.argument_types import ArgumentParser, count, real_number, token_count, whole_number
from megatron_star.job.progress import heartbeat
from megatron_star.job.single_process import exit_on_user_errors
from megatron_star.model.checkpoint import DESCRIPTION_FILE, read_checkpoint_info
from megatron_star.planning.deployment import ModelSize
from megatron_star.planning.estimates import (
    LARGEST_CLUSTER,
    MODES,
    MOST_WAVES,
    Estimate,
    Workload,
    estimates,
    half_is_faster,
    refuse,
)
from megatron_star.planning.hardware import GPUS, Cluster
from megatron_star.planning.sizes import sizes_of

LARGEST_NODE, LARGEST_CONTEXT, MOST_BLOCKS = 128, 16 << 20, 4096
SIZES = ("block_size", "anchor_size", "passed_keys")
Size = Annotated[int, Field(ge=1, lt=1 << 24)]
TokensOnBothSides = Annotated[list[int], Field(min_length=2, max_length=2)]


class _Arguments:
    """What is read of a model, and what of it can be planned for."""

    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Size
    ffn_hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Size
    kv_channels: Size
    swiglu: bool
    vocab_size: Size
    untie_embeddings_and_output_weights: bool
    max_position_embeddings: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    num_experts: NotRequired[Size | None]
    moe_router_topk: NotRequired[Size | None]
    moe_ffn_hidden_size: NotRequired[Size | None]
    moe_shared_expert_intermediate_size: NotRequired[Size | None]
    gated_mlp: NotRequired[bool]
    window_size: NotRequired[TokensOnBothSides | None]
    window_attn_skip_freq: NotRequired[list[int] | None]
    attention_chunk_size: NotRequired[Size | None]
    chunked_layers: NotRequired[list[int] | None]


_ARGUMENTS = strict_fields(_Arguments)


def model_size(args: Mapping[str, Any]) -> ModelSize:
    """From Megatron's argument names, as a converted checkpoint carries them."""
    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    of_experts = ("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    experts = {name: args[name] for name in of_experts if args.get("num_experts") and args.get(name)}
    of_masks = ("window_size", "window_attn_skip_freq", "chunked_layers")
    masks = {name: tuple(args[name]) for name in of_masks if args.get(name) is not None}
    return ModelSize(
        **{name: args[name] for name in same},
        kv_channels=args["kv_channels"],
        gated_linear_unit=args["swiglu"] or args.get("gated_mlp", False),
        vocab_size=args["vocab_size"],
        tied_embeddings=not args["untie_embeddings_and_output_weights"],
        num_moe_experts=args.get("num_experts"),
        attention_chunk_size=args.get("attention_chunk_size"),
        **experts,
        **masks,
    )


def read_model(path: Path) -> Mapping[str, Any]:
    """Megatron arguments of a converted checkpoint, a Hugging Face folder, or its config.json.

    Raises:
        ValueError, OSError: there is none, or the model is not supported, or cannot be.
    """
    args = validated(_ARGUMENTS, _unchecked_arguments(path), str(path))
    num_experts, used = args.get("num_experts"), args.get("moe_router_topk")
    if num_experts and not (used and used <= num_experts and args.get("moe_ffn_hidden_size")):
        raise ValueError(
            f"{path}: {num_experts} experts, moe_router_topk {used} and moe_ffn_hidden_size "
            f"{args.get('moe_ffn_hidden_size')} do not describe a model"
        )
    return args


def _unchecked_arguments(path: Path) -> Mapping[str, Any]:
    if path.name == "config.json":
        return model_arguments(read_hf_config(path.parent))
    if (path / "config.json").is_file():
        return model_arguments(read_hf_config(path))
    return read_checkpoint_info(path.parent if path.name == DESCRIPTION_FILE else path).args


def print_table(workload: Workload, cluster: Cluster, found: list[Estimate]) -> None:
    """For people; the best first."""
    billions = workload.size.num_parameters / 1e9
    print(
        f"{billions:.2f} B parameters, {workload.num_context_tokens:,} context tokens\n"
        f"star: {_sizes(workload.settings['star'])}\n"
        f"recompute and broadcast, as published: {_sizes(workload.settings['broadcast'])}\n"
        f"{cluster.num_gpus} x {cluster.gpu.name} in nodes of "
        f"{cluster.gpus_per_node}, of which each has {cluster.gpu.memory_bytes / 1e9:.0f} GB to use\n"
    )
    print(f"{'':9}   {'GB on each GPU':^31}   {'TTFT in s':^39}   {'TPOT':>7}")
    columns = f"{'weights':>7} {'KV':>7} {'other':>7} {'all':>7}   " + " ".join(
        f"{mode:>9}" for mode in MODES
    )
    print(f"{'TP x CP':>9}   {columns}   {'in ms':>7}")
    for of in found:
        print(_row(of))
    if half_is_faster(workload, cluster, found[0]):
        print(f"\nHalf as many GPUs would answer sooner: {found[0].cp_size} ranks share too few blocks.")
    print(f"\n{_command(workload, cluster, found[0])}\n\nEstimates; docs/slurm.md says what they assume.")


def _sizes(star: StarConfig) -> str:
    block_size, anchor_size, passed_keys = sizes_of(star).values()
    passed = f" and {passed_keys:,} passed keys" if passed_keys else ""
    return f"blocks of {block_size:,} with an anchor of {anchor_size:,}{passed}"


def _row(of: Estimate) -> str:
    sizes = (of.weights_bytes, of.kv_bytes, of.activation_bytes, of.bytes_by_mode["star"])
    memory = " ".join(f"{num_bytes / 1e9:>7.1f}" for num_bytes in sizes)
    times = " ".join(f"{of.ttft_s[mode]:>9.2f}" if of.fits[mode] else f"{'no room':>9}" for mode in MODES)
    return f"{of.tp_size:>2} x {of.cp_size:<4}   {memory}   {times}   {of.tpot_s * 1e3:>7.1f}"


def _command(workload: Workload, cluster: Cluster, best: Estimate) -> str:
    tasks = min(cluster.gpus_per_node, cluster.num_gpus)
    nodes = cluster.num_gpus // tasks
    asked = {name.upper(): getattr(workload.star, name) for name in SIZES}
    sizes = "".join(f"{name}={size} " for name, size in asked.items() if size is not None)
    return (
        f"CHECKPOINT=DIR TP={best.tp_size} CP={best.cp_size} {sizes}sbatch "
        f"--nodes={nodes} \\\n    --ntasks-per-node={tasks} --gpus-per-node={tasks} launch/serve.sbatch"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    _add_cluster(parser)
    _add_workload(parser)
    parser.add_argument("--json", action="store_true", help="print everything, for scripts; default: a table")
    args = parser.parse_args(argv)
    _check_sizes(parser, args)
    return args


def _add_cluster(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint, Hugging Face folder, config.json"
    )
    parser.add_argument(
        "--context", type=token_count, required=True, metavar="TOKENS", help="at most 16M; 128K is 131,072"
    )
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="all of them, at most 1024")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="their kind")
    parser.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="of them in one node")
    for name, to in (("--node-link", "others of its node"), ("--network-link", "other nodes")):
        parser.add_argument(
            name,
            type=real_number(1e-3, 1e6),
            metavar="GB/S",
            help=f"one GPU to {to}; default: as in the data sheet",
        )


def _add_workload(parser: ArgumentParser) -> None:
    for name in SIZES:
        option = OPTIONS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=token_count, metavar=option.placeholder, help=option.help
        )
    parser.add_argument(
        "--wave-tokens",
        type=token_count,
        default=StarConfig().wave_tokens,
        metavar="TOKENS",
        help="that a rank encodes in one forward pass",
    )
    parser.add_argument(
        "--num-tokens-to-generate",
        type=whole_number(1, 1 << 20),
        default=256,
        metavar="N",
        help="of an answer",
    )


def _check_sizes(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """A plan of very many pieces takes minutes to make, and nobody would run it."""
    context = args.context
    bounds = {
        "gpus": (1, LARGEST_CLUSTER),
        "gpus_per_node": (1, LARGEST_NODE),
        "context": (1, LARGEST_CONTEXT),
        "block_size": (-(-context // MOST_BLOCKS), MOST_TOKENS),
        "wave_tokens": (-(-context // MOST_WAVES), MOST_TOKENS),
    }
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        if value is not None and not max(1, least) <= value <= most:
            of = f" for a context of {context:,} tokens" if least > 1 else ""
            parser.error(
                f"--{name.replace('_', '-')} is {value}: it must be from {max(1, least)} to {most}{of}"
            )


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The GPUs that the arguments describe; given link speeds are used as they are."""
    links = {"node_link_bytes_per_s": args.node_link, "network_link_bytes_per_s": args.network_link}
    given = {name: 1e9 * value for name, value in links.items() if value is not None}
    return Cluster(replace(GPUS[args.gpu], **given), args.gpus, args.gpus_per_node)


def run(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        ValueError, OSError: the model cannot be read, or does not fit.
    """
    model = read_model(args.model)
    sizes = {name: getattr(args, name) for name in SIZES}
    star = StarConfig(**sizes, wave_tokens=args.wave_tokens)
    workload = Workload(model_size(model), args.context, args.num_tokens_to_generate, star)
    cluster = cluster_of(args)
    with heartbeat("planning"):
        found = estimates(workload, cluster)
        if not found or not found[0].fits["star"]:
            refuse(workload, cluster, found)
    if args.context + args.num_tokens_to_generate > model["max_position_embeddings"]:
        print(f"warning: the model was made for {model['max_position_embeddings']:,} tokens", file=sys.stderr)
    if args.json:
        settings = {name: asdict(star) for name, star in workload.settings.items()}
        plans = [asdict(of) for of in found]
        print(json.dumps({"gpu": asdict(cluster.gpu), "settings": settings, "plans": plans}, indent=2))
    else:
        print_table(workload, cluster, found)


def main() -> None:
    with exit_on_user_errors():
        run(parse_arguments())


if __name__ == "__main__":
    main()
