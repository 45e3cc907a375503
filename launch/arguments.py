"""Command-line arguments that the programs of this folder share: Megatron's names where Megatron has one."""

import argparse
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.inference.sampling_params import SamplingParams

from launch.devices import BACKENDS
from megatron_star.attention.kernels import KERNEL_NAMES
from megatron_star.config import ANCHOR_TRANSFERS, DECODE_WEIGHTS, MODES, StarConfig, parse_token_count
from megatron_star.model.build import TRANSFORMER_IMPLEMENTATIONS
from megatron_star.server.settings import ServerSettings

DEFAULTS = StarConfig()


class ArgumentParser(argparse.ArgumentParser):
    """Raises on a wrong argument, so that one rank reports it and all end. Arguments are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError instead of printing the usage on every rank."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is loaded, and on which grid of ranks."""
    group = parser.add_argument_group("model")
    group.add_argument("--load", required=True, metavar="DIR", help="checkpoint of checkpoints_tools")
    group.add_argument("--tensor-model-parallel-size", type=positive, default=1, metavar="N")
    group.add_argument("--context-parallel-size", type=positive, default=1, metavar="N")
    dtype = group.add_mutually_exclusive_group()
    dtype.add_argument(
        "--bf16", dest="dtype", action="store_const", const=torch.bfloat16, help="run in bfloat16"
    )
    dtype.add_argument(
        "--fp16", dest="dtype", action="store_const", const=torch.float16, help="run in float16"
    )
    dtype.add_argument(
        "--fp32", dest="dtype", action="store_const", const=torch.float32, help="run in float32"
    )
    group.add_argument(
        "--no-verify-weights",
        action="store_true",
        help="do not compare the files of the weights with their hashes while they are read",
    )
    group.add_argument("--transformer-impl", choices=TRANSFORMER_IMPLEMENTATIONS, default="local")
    group.add_argument("--star-attention-kernel", choices=KERNEL_NAMES, default="auto")
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
        "and some seconds each when the job starts; default: not",
    )
    group.add_argument(
        "--star-kv-gigabytes",
        type=float,
        metavar="GB",
        help="KV that a rank may hold; default: a share of the memory that is free",
    )
    group.add_argument(
        "--distributed-backend",
        choices=BACKENDS,
        help="between ranks; default: nccl on GPUs, gloo without; over gloo ranks may share a GPU, slowly",
    )
    group.add_argument(
        "--distributed-timeout-minutes", type=_timeout, default=timedelta(minutes=10), metavar="N"
    )


def add_star_arguments(parser: argparse.ArgumentParser) -> None:
    """How a context is encoded; `star_config` reads them."""
    group = parser.add_argument_group("Star Attention (token counts may be written 32K or 1M)")
    group.add_argument("--star-mode", choices=MODES, default=DEFAULTS.mode)
    group.add_argument("--star-block-size", type=token_count, default=DEFAULTS.block_size, metavar="TOKENS")
    group.add_argument(
        "--star-anchor-size", type=token_count, metavar="TOKENS", help="default: as large as the first block"
    )
    group.add_argument("--star-neighbor-blocks", type=_count, default=DEFAULTS.neighbor_blocks, metavar="N")
    group.add_argument("--star-anchor", choices=ANCHOR_TRANSFERS, default=DEFAULTS.anchor)
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
    group.add_argument("--num-tokens-to-generate", type=positive, default=64, metavar="N")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=_count, default=0, metavar="K", help="1 is greedy, 0 is off")
    group.add_argument("--top-p", type=float, default=0.0, metavar="P", help="0 is off")
    group.add_argument("--seed", type=_count, default=0, metavar="N")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server listens, whom it lets in, and how much; `server_settings` reads them."""
    group = parser.add_argument_group("server (byte counts may be written 64K or 16M)")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    group.add_argument("--port", type=_count, default=5000, metavar="N")
    group.add_argument("--api-key-file", metavar="FILE", help="clients must send the key that is in it")
    group.add_argument("--served-model-name", metavar="NAME", help="default: the name of the --load folder")
    group.add_argument("--max-request-bytes", type=token_count, default=16 << 20, metavar="BYTES")
    group.add_argument(
        "--max-concurrent-requests", type=positive, default=64, metavar="N", help="sequences that run"
    )
    group.add_argument(
        "--max-queued-requests", type=_count, default=256, metavar="N", help="sequences that wait for that"
    )
    group.add_argument("--max-context-tokens", type=token_count, metavar="TOKENS")
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
        "--star-separator", metavar="TEXT", help="between context and query, where a prompt has it"
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
        separator=args.star_separator or None,
        api_key=Path(key_file).read_text(encoding="utf-8").strip() if key_file else None,
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


def _argument(convert: Callable[[str], int], text: str) -> int:
    try:
        return convert(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def token_count(text: str) -> int:
    """An argument type: `4096`, `32K` or `1M`."""
    return _argument(parse_token_count, text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _batch_sizes(text: str) -> tuple[int, ...]:
    """Whole numbers; `check_can_be_compiled` knows the upper bound."""
    return tuple(positive(number.strip()) for number in text.split(","))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return seconds


def _timeout(text: str) -> timedelta:
    return timedelta(minutes=positive(text))
