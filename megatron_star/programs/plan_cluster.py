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
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field

from checkpoints_tools.hf_config import model_arguments, read_hf_config
from megatron_star.checked_input import strict_fields, validated
from megatron_star.config import KV_DTYPES, MOST_TOKENS, OPTIONS, StarConfig
from megatron_star.job.argument_types import ArgumentParser, count, real_number, token_count, whole_number
from megatron_star.job.progress import heartbeat
from megatron_star.job.single_process import exit_on_user_errors
from megatron_star.model.checkpoint import DESCRIPTION_FILE, read_checkpoint_info
from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.estimates import (
    LARGEST_CLUSTER,
    MOST_WAVES,
    Estimate,
    Workload,
    estimates,
    refuse,
)
from megatron_star.planning.hardware import GPUS, Cluster
from megatron_star.planning.known_models import KNOWN_MODELS
from megatron_star.planning.model_size import ModelSize
from megatron_star.programs.plan_report import SIZES, print_table

LARGEST_NODE, LARGEST_CONTEXT, MOST_BLOCKS = 128, 16 << 20, 4096
LATENT_SIZES = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
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
    moe_layer_freq: NotRequired[Annotated[list[Literal[0, 1]], Field(max_length=10_000)] | Literal[1] | None]
    moe_router_topk: NotRequired[Size | None]
    moe_ffn_hidden_size: NotRequired[Size | None]
    moe_shared_expert_intermediate_size: NotRequired[Size | None]
    moe_shared_expert_gate: NotRequired[bool | None]
    moe_latent_size: NotRequired[Size | None]
    gated_mlp: NotRequired[bool]
    window_size: NotRequired[TokensOnBothSides | None]
    window_attn_skip_freq: NotRequired[list[int] | None]
    attention_chunk_size: NotRequired[Size | None]
    chunked_layers: NotRequired[list[int] | None]
    multi_latent_attention: NotRequired[bool | None]
    q_lora_rank: NotRequired[Size | None]
    kv_lora_rank: NotRequired[Size | None]
    qk_head_dim: NotRequired[Size | None]
    qk_pos_emb_head_dim: NotRequired[Size | None]
    v_head_dim: NotRequired[Size | None]


_ARGUMENTS = strict_fields(_Arguments)


def read_model(path: Path) -> Mapping[str, Any]:
    """Megatron arguments of a converted checkpoint, a Hugging Face folder, its config.json, or a model that
    is known by name.

    Raises:
        ValueError, OSError: there is none, or the model is not supported, or cannot be.
    """
    args = validated(_ARGUMENTS, _unchecked_arguments(path), str(path))
    _check_experts(args, path)
    missing = [name for name in LATENT_SIZES if args.get("multi_latent_attention") and not args.get(name)]
    if missing:
        raise ValueError(f"{path}: latent attention needs {' and '.join(missing)}")
    return args


def _check_experts(args: Mapping[str, Any], path: Path) -> None:
    num_experts, used = args.get("num_experts"), args.get("moe_router_topk")
    if not num_experts:
        return
    if not (used and used <= num_experts and args.get("moe_ffn_hidden_size")):
        raise ValueError(
            f"{path}: {num_experts} experts, moe_router_topk {used} and moe_ffn_hidden_size "
            f"{args.get('moe_ffn_hidden_size')} do not describe a model"
        )
    layers = args.get("moe_layer_freq")
    if isinstance(layers, list) and len(layers) != args["num_layers"]:
        raise ValueError(
            f"{path}: moe_layer_freq has {len(layers)} values: it must have one for each of "
            f"{args['num_layers']} layers"
        )


def _unchecked_arguments(path: Path) -> Mapping[str, Any]:
    if str(path) in KNOWN_MODELS and not path.exists():
        return KNOWN_MODELS[str(path)]
    if path.name == "config.json":
        return model_arguments(read_hf_config(path.parent))
    if (path / "config.json").is_file():
        return model_arguments(read_hf_config(path))
    return read_checkpoint_info(path.parent if path.name == DESCRIPTION_FILE else path).args


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    _add_cluster(parser)
    _add_workload(parser)
    _add_experts(parser)
    parser.add_argument("--json", action="store_true", help="print everything, for scripts; default: a table")
    args = parser.parse_args(argv)
    _check_sizes(parser, args)
    return args


def _add_cluster(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help=f"checkpoint, Hugging Face folder, config.json, or {' or '.join(KNOWN_MODELS)}",
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
        "--kv-dtype",
        choices=KV_DTYPES,
        default="auto",
        help="what the context is kept in; auto: in 16 bits, as it is computed",
    )
    parser.add_argument(
        "--num-tokens-to-generate",
        type=whole_number(1, 1 << 20),
        default=256,
        metavar="N",
        help="of an answer",
    )


def _add_experts(parser: ArgumentParser) -> None:
    for kind, help_text in (
        ("model", "ranks over which the experts of a layer are spread"),
        ("tensor", "ranks over which each expert is cut"),
    ):
        parser.add_argument(
            f"--expert-{kind}-parallel-size",
            type=count,
            metavar="N",
            help=f"{help_text}; default: the best",
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
    workload = _workload(args, ModelSize.of_arguments(model))
    cluster = cluster_of(args)
    with heartbeat("planning"):
        found = estimates(workload, cluster)
        if not found or not found[0].fits["star"]:
            refuse(workload, cluster, found)
    if args.context + args.num_tokens_to_generate > model["max_position_embeddings"]:
        print(f"warning: the model was made for {model['max_position_embeddings']:,} tokens", file=sys.stderr)
    if args.json:
        print(json.dumps(_everything(workload, cluster, found), indent=2))
    else:
        print_table(workload, cluster, found)


def _workload(args: argparse.Namespace, size: ModelSize) -> Workload:
    ep_size, expert_tp_size = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    if (ep_size or expert_tp_size) and not size.num_moe_experts:
        raise ValueError(f"{args.model}: the model has no experts, so they cannot be spread over ranks")
    sizes = {name: getattr(args, name) for name in SIZES}
    return Workload(
        size,
        args.context,
        args.num_tokens_to_generate,
        StarConfig(**sizes, wave_tokens=args.wave_tokens),
        kv_dtype=args.kv_dtype,
        ep_size=ep_size,
        expert_tp_size=expert_tp_size,
    )


def _everything(workload: Workload, cluster: Cluster, found: list[Estimate]) -> dict[str, Any]:
    """For scripts."""
    size = workload.size
    kv = kv_layers(size, tp_size=1, bytes_per_value=workload.bytes_per_value, kv_dtype=workload.kv_dtype)
    model = {
        "parameters": size.num_parameters,
        "active_parameters": size.num_parameters_per_token,
        "kv_bytes_per_token": kv.context_bytes_per_token,
    }
    settings = {name: asdict(star) for name, star in workload.settings.items()}
    plans = [asdict(of) for of in found]
    return {"model": model, "gpu": asdict(cluster.gpu), "settings": settings, "plans": plans}


def main() -> None:
    with exit_on_user_errors():
        run(parse_arguments())


if __name__ == "__main__":
    main()
