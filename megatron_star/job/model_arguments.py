"""The command line's group of the model: what is loaded, how it runs, and on which grid of ranks."""

import argparse
from datetime import timedelta

import torch

from megatron_star.attention.kernels import KERNEL_NAMES
from megatron_star.config import CUDA_GRAPH, DECODE_WEIGHTS, KV_DTYPES
from megatron_star.job.argument_types import byte_count, positive, real_number, text_argument, whole_number
from megatron_star.job.devices import BACKENDS
from megatron_star.model.layer_spec import TRANSFORMER_IMPLEMENTATIONS

MOST_MINUTES = 60 * 24 * 365
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loaded_job` reads."""
    group = parser.add_argument_group("model")
    _add_what_is_loaded(group)
    _add_how_it_runs(group)
    _add_how_ranks_share(group)
    _add_where_contexts_are_kept(parser.add_argument_group("context store"))


def _add_what_is_loaded(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--load", type=text_argument, required=True, metavar="DIR", help="checkpoint of checkpoints_tools"
    )
    group.add_argument(
        "--tensor-model-parallel-size", type=positive, default=1, metavar="N", help="ranks that share a layer"
    )
    group.add_argument(
        "--context-parallel-size", type=positive, default=1, metavar="N", help="ranks that share a context"
    )
    group.add_argument(
        "--expert-model-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="ranks that a layer's experts are spread over, of all TP x CP",
    )
    group.add_argument(
        "--expert-tensor-parallel-size",
        type=positive,
        metavar="N",
        help="ranks that share an expert; default: as many as share a layer, or 1 where experts are spread",
    )
    precision = group.add_mutually_exclusive_group()
    for name, dtype in PRECISIONS.items():
        precision.add_argument(
            f"--{name}",
            dest="dtype",
            action="store_const",
            const=dtype,
            help=f"run in {str(dtype).removeprefix('torch.')}; default: as stored",
        )


def _add_how_it_runs(group: argparse._ArgumentGroup) -> None:
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
    add_cuda_graph_argument(group)


def add_cuda_graph_argument(group: argparse._ArgumentGroup) -> None:
    """`--cuda-graph CHOICE`."""
    group.add_argument(
        "--cuda-graph",
        choices=CUDA_GRAPH,
        default="auto",
        help="capture steps of token generation in CUDA graphs, started at once by the host; auto: where one "
        "GPU has the whole model and its contexts; on: also many ranks over NCCL, or refuse to start",
    )


def _add_how_ranks_share(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="auto",
        help="what the keys and values of contexts are kept in: int8 and fp8 round them to 8 bits, and take "
        "half of bf16's memory; default: auto, as they are computed",
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


def _add_where_contexts_are_kept(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--context-store",
        type=text_argument,
        metavar="DIR",
        help="folder of all ranks: encoded contexts are written to it, and read back instead of being "
        "encoded again; default: none",
    )
    group.add_argument(
        "--context-store-bytes",
        type=byte_count,
        default=100 * 10**9,
        metavar="BYTES",
        help="that the folder may have, say 500GB: what was least recently used goes; default: 100GB",
    )


_minutes = whole_number(1, MOST_MINUTES)


def _timeout(text: str) -> timedelta:
    return timedelta(minutes=_minutes(text))


def _batch_sizes(text: str) -> tuple[int, ...]:
    """Whole numbers; `check_can_be_compiled` knows the upper bound."""
    return tuple(positive(number.strip()) for number in text.split(","))
