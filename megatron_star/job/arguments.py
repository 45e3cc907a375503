"""Command-line arguments that the programs of this folder share: Megatron's names where Megatron has one."""

import argparse
from datetime import timedelta
from pathlib import Path

import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.attention.kernels import KERNEL_NAMES
from megatron_star.checked_input import read_text
from megatron_star.config import ANCHOR_TRANSFERS, DECODE_WEIGHTS, MODES, StarConfig
from megatron_star.job.argument_types import (
    count,
    positive,
    real_number,
    seed,
    text_argument,
    token_count,
    whole_number,
)
from megatron_star.job.devices import BACKENDS
from megatron_star.model.build import TRANSFORMER_IMPLEMENTATIONS
from megatron_star.server.settings import ServerSettings

DEFAULTS = StarConfig()
MOST_MINUTES = 60 * 24 * 365
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
"""A share of them times any logit is a number in float32; below, sampling is greedy for all purposes."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is loaded, and on which grid of ranks."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--load", type=text_argument, required=True, metavar="DIR", help="checkpoint of checkpoints_tools"
    )
    group.add_argument(
        "--tensor-model-parallel-size", type=positive, default=1, metavar="N", help="ranks that share a layer"
    )
    group.add_argument(
        "--context-parallel-size", type=positive, default=1, metavar="N", help="ranks that share a context"
    )
    dtype = group.add_mutually_exclusive_group()
    dtype.add_argument(
        "--bf16",
        dest="dtype",
        action="store_const",
        const=torch.bfloat16,
        help="run in bfloat16; default: as stored",
    )
    dtype.add_argument(
        "--fp16",
        dest="dtype",
        action="store_const",
        const=torch.float16,
        help="run in float16; default: as stored",
    )
    dtype.add_argument(
        "--fp32",
        dest="dtype",
        action="store_const",
        const=torch.float32,
        help="run in float32; default: as stored",
    )
    group.add_argument(
        "--transformer-impl",
        choices=TRANSFORMER_IMPLEMENTATIONS,
        default="local",
        help="whose layers: Megatron-Core's own, or TransformerEngine's",
    )
    group.add_argument(
        "--star-attention-kernel",
        choices=KERNEL_NAMES,
        default="auto",
        help="what computes attention; auto takes the fastest that is installed",
    )
    group.add_argument(
        "--no-verify-weights",
        action="store_true",
        help="do not compare weights with the hashes of their files while they are read; default: compare",
    )
    group.add_argument(
        "--decode-weights",
        choices=DECODE_WEIGHTS,
        default="auto",
        help="what a context-parallel rank reads to generate a token: all weights, its slice, or the faster",
    )
    group.add_argument(
        "--compile-decode",
        type=_batch_sizes,
        default=(),
        metavar="N[,N...]",
        help="compile the layers for so many sequences decoded together, say 1,2,4,8: takes a C++ compiler, "
        "and some seconds each when the job starts",
    )
    group.add_argument(
        "--star-kv-gigabytes",
        type=real_number(1e-9, 1e6),
        metavar="GB",
        help="KV that a rank may hold; default: a share of the memory that is free",
    )
    group.add_argument(
        "--distributed-backend",
        choices=BACKENDS,
        help="between ranks; default: nccl on GPUs, gloo without; over gloo ranks may share a GPU, slowly",
    )
    group.add_argument(
        "--distributed-timeout-minutes",
        type=_timeout,
        default=timedelta(minutes=10),
        metavar="N",
        help="how long a rank waits for another; default: 10",
    )


def add_star_arguments(parser: argparse.ArgumentParser) -> None:
    """How a context is encoded; `star_config` reads them."""
    group = parser.add_argument_group("Star Attention (token counts may be written 32K or 1M)")
    group.add_argument(
        "--star-mode",
        choices=MODES,
        default=DEFAULTS.mode,
        help="what a context token sees: anchor and own block, or everything; auto: whichever is cheaper",
    )
    group.add_argument(
        "--star-block-size",
        type=token_count,
        default=DEFAULTS.block_size,
        metavar="TOKENS",
        help="at most so many in a block",
    )
    group.add_argument(
        "--star-anchor-size",
        type=token_count,
        metavar="TOKENS",
        help="beginning of the context that all blocks see; default: as large as the first block",
    )
    group.add_argument(
        "--star-neighbor-blocks",
        type=count,
        default=DEFAULTS.neighbor_blocks,
        metavar="N",
        help="blocks before its own that a token sees, too",
    )
    group.add_argument(
        "--star-anchor",
        choices=ANCHOR_TRANSFERS,
        default=DEFAULTS.anchor,
        help="encode the anchor once and send its KV, or again for every block, as published",
    )
    group.add_argument(
        "--star-wave-tokens",
        type=token_count,
        default=DEFAULTS.wave_tokens,
        metavar="TOKENS",
        help="most context tokens that a rank encodes in one forward pass (without a GPU, never above 2K)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; `sampling_params` reads them."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num-tokens-to-generate", type=positive, default=64, metavar="N", help="at most so many"
    )
    group.add_argument(
        "--temperature",
        type=real_number(LEAST_TEMPERATURE, MOST_TEMPERATURE, or_zero=True),
        default=1.0,
        metavar="T",
        help="0 is greedy",
    )
    group.add_argument("--top-k", type=count, default=0, metavar="K", help="1 is greedy, 0 is off")
    group.add_argument("--top-p", type=real_number(0, 1), default=0.0, metavar="P", help="0 is off")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the random choice of tokens")
    group.add_argument(
        "--stop",
        type=text_argument,
        action="append",
        default=[],
        metavar="TEXT",
        help="end at this text; may be repeated",
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server listens, whom it lets in, and how much; `server_settings` reads them."""
    group = parser.add_argument_group("server (byte counts may be written 64K or 16M)")
    group.add_argument(
        "--host", type=text_argument, default="127.0.0.1", help="0.0.0.0 lets other machines in"
    )
    group.add_argument(
        "--port", type=whole_number(0, 65535), default=5000, metavar="N", help="0 takes a free one"
    )
    group.add_argument(
        "--api-key-file",
        type=text_argument,
        metavar="FILE",
        help="clients must send the key that is in it; default: no key",
    )
    group.add_argument(
        "--served-model-name",
        type=text_argument,
        metavar="NAME",
        help="default: the name of the --load folder",
    )
    group.add_argument(
        "--max-request-bytes", type=token_count, default=16 << 20, metavar="BYTES", help="of one body"
    )
    group.add_argument(
        "--max-concurrent-requests", type=positive, default=64, metavar="N", help="sequences that run"
    )
    group.add_argument(
        "--max-queued-requests", type=count, default=256, metavar="N", help="sequences that wait for that"
    )
    group.add_argument(
        "--max-context-tokens",
        type=token_count,
        metavar="TOKENS",
        help="of one context; default: the model's limit",
    )
    group.add_argument("--drain-seconds", type=_seconds, default=30.0, metavar="S", help="after SIGTERM")
    group.add_argument(
        "--request-body-seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="for a request's head, and then for its body",
    )
    group.add_argument(
        "--keep-alive-seconds",
        type=_seconds,
        default=75.0,
        metavar="S",
        help="for which a connection may say nothing after an answer; more than its client keeps it (75)",
    )
    group.add_argument(
        "--star-query-tokens",
        type=positive,
        default=256,
        metavar="TOKENS",
        help="end of a prompt that is its query, where the request does not say",
    )
    group.add_argument(
        "--star-separator",
        type=text_argument,
        metavar="TEXT",
        help="between context and query, where a prompt has it",
    )
    group.add_argument(
        "--star-max-wait-seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="between two tokens of an answer while another context is encoded; waves are cut to it",
    )


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The settings that these arguments ask for; raises ValueError or OSError."""
    key_file = args.api_key_file
    return ServerSettings(
        model_name=args.served_model_name or Path(args.load).resolve().name,
        star=star_config(args),
        num_query_tokens=args.star_query_tokens,
        separator=args.star_separator,
        api_key=read_text(key_file).strip() if key_file else None,
        max_request_bytes=args.max_request_bytes,
        max_concurrent_requests=args.max_concurrent_requests,
        max_queued_requests=args.max_queued_requests,
        max_context_tokens=args.max_context_tokens,
        body_seconds=args.request_body_seconds,
        keep_alive_seconds=args.keep_alive_seconds,
        host=args.host,
    )


def star_config(args: argparse.Namespace) -> StarConfig:
    """The configuration that these arguments ask for; raises ValueError on a value out of bounds."""
    return StarConfig(
        mode=args.star_mode,
        block_size=args.star_block_size,
        anchor_size=args.star_anchor_size,
        neighbor_blocks=args.star_neighbor_blocks,
        anchor=args.star_anchor,
        wave_tokens=args.star_wave_tokens,
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Megatron's sampling parameters of these arguments."""
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.num_tokens_to_generate,
        stop_words=args.stop or None,
    )


_seconds = real_number(0, 1e7, what="a number of seconds")
_minutes = whole_number(1, MOST_MINUTES)


def _batch_sizes(text: str) -> tuple[int, ...]:
    """Whole numbers; `check_can_be_compiled` knows the upper bound."""
    return tuple(positive(number.strip()) for number in text.split(","))


def _timeout(text: str) -> timedelta:
    return timedelta(minutes=_minutes(text))
