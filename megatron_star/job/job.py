"""A job of ranks with a loaded model, as the programs that answer questions need it."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.code_version import check_same_checkpoint
from megatron_star.job.context_store import Stores, open_context_store
from megatron_star.job.environment import RankEnvironment
from megatron_star.job.grid import Grid
from megatron_star.job.loading import load_star_model
from megatron_star.job.memory import agreed_kv_budget
from megatron_star.job.progress import heartbeat
from megatron_star.job.session import process_groups
from megatron_star.model.checkpoint import CheckpointInfo, read_checkpoint_info
from megatron_star.model.weight_hashes import Share
from megatron_star.parallel.control import is_driver, on_driver, on_every_rank
from megatron_star.parallel.groups import StarGroups
from megatron_star.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Job:
    """One rank of it.

    Attributes:
        budget: bytes of KV that every rank has room for.
        tokenizer: on the driver; None on the workers.
        stores: where contexts are kept, if anywhere.
    """

    groups: StarGroups
    info: CheckpointInfo
    star_model: StarModel
    budget: int
    tokenizer: PreTrainedTokenizerBase | None
    stores: Stores | None = None

    @property
    def is_driver(self) -> bool:
        """Whether this rank is the driver."""
        return is_driver(self.groups.control)

    @property
    def max_sequence_length(self) -> int:
        """Tokens that the model was made for."""
        return self.info.args["max_position_embeddings"]


@contextmanager
def loaded_job[T](
    args: argparse.Namespace, environment: RankEnvironment, prepare: Callable[[], T]
) -> Iterator[tuple[Job, T | None]]:
    """The groups and the model that `add_model_arguments` describes, for the time of a `with` block.

    Args:
        prepare: called on the driver before anything is loaded, for what may fail because of the user's
            input. What it returns comes with the job, on the driver.

    Raises:
        SharedError: on all ranks, if `prepare` raised a ValueError or OSError, or one cannot load the model.
    """
    with process_groups(
        environment,
        Grid.of_arguments(args),
        timeout=args.distributed_timeout_minutes,
        backend=args.distributed_backend,
    ) as (groups, device):
        prepared = on_driver(prepare, groups.control)
        yield _load(args, environment, groups, device), prepared


def _load(
    args: argparse.Namespace, environment: RankEnvironment, groups: StarGroups, device: torch.device
) -> Job:
    control, ranks_here = groups.control, environment.local_world_size
    info = on_every_rank(lambda: read_checkpoint_info(args.load), control)
    check_same_checkpoint(info, control)
    tokenizer = on_driver(lambda: load_tokenizer(info.tokenizer_directory), control)
    if args.compile_decode and environment.is_driver:
        sizes = ", ".join(map(str, args.compile_decode))
        print(f"compiling the layers for {sizes} sequences, which takes a while", file=sys.stderr, flush=True)
    with heartbeat(f"reading the weights of {args.load}", on=environment.is_driver):
        star_model = load_star_model(
            info,
            groups,
            device=device,
            dtype=args.dtype or info.dtype,
            kernel=args.star_attention_kernel,
            kv_dtype=args.kv_dtype,
            transformer_impl=args.transformer_impl,
            decode_weights=args.decode_weights,
            compiled_rows=args.compile_decode,
            cuda_graph=args.cuda_graph,
            verify_weights=None if args.no_verify_weights else Share(environment.local_rank, ranks_here),
        )
    budget = agreed_kv_budget(args.star_kv_gigabytes, device, ranks_here, control)
    stores = open_context_store(args, info, star_model, groups)
    return Job(groups, info, star_model, budget, tokenizer, stores)
