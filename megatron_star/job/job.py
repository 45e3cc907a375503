"""A job of ranks with a loaded model, as the programs that answer questions need it."""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_star.algorithm.star_model import StarModel
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.job.code_version import check_same_checkpoint
from megatron_star.job.environment import RankEnvironment
from megatron_star.job.model import kv_budget, load_model
from megatron_star.job.progress import heartbeat
from megatron_star.job.session import process_groups
from megatron_star.model.checkpoint import CheckpointInfo, read_checkpoint_info
from megatron_star.parallel.control import from_driver, on_every_rank
from megatron_star.parallel.groups import StarGroups
from megatron_star.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Job:
    """One rank of it.

    Attributes:
        budget: bytes of KV that every rank has room for.
        tokenizer: on the driver.
    """

    groups: StarGroups
    info: CheckpointInfo
    star_model: StarModel
    budget: int
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def max_sequence_length(self) -> int:
        """Tokens that the model was made for."""
        return self.info.args["max_position_embeddings"]

    def engine(self, max_running: int, max_wait_seconds: float = math.inf) -> StarEngine:
        """The driver's engine; the other ranks then call `run_worker`."""
        return StarEngine(
            self.star_model,
            self.tokenizer,
            self.groups.control,
            max_sequence_length=self.max_sequence_length,
            budget_bytes_per_rank=self.budget,
            max_running=max_running,
            max_wait_seconds=max_wait_seconds,
        )


@contextmanager
def loaded_job(
    args: argparse.Namespace, environment: RankEnvironment, before_loading: Callable[[], None] | None = None
) -> Iterator[Job]:
    """The groups and the model that `add_model_arguments` describes, for the time of a `with` block.

    Args:
        before_loading: called on the driver; if it raises, so do all ranks, before anything is loaded.

    Raises:
        ValueError: on all ranks, if one of them cannot.
    """
    with process_groups(
        environment,
        tp_size=args.tensor_model_parallel_size,
        cp_size=args.context_parallel_size,
        timeout=args.distributed_timeout_minutes,
        backend=args.distributed_backend,
    ) as (groups, device):
        if before_loading:
            from_driver(before_loading, groups.control)
        info = on_every_rank(lambda: read_checkpoint_info(args.load), groups.control)
        check_same_checkpoint(info, groups.control)
        tokenizers: list[PreTrainedTokenizerBase] = []
        from_driver(lambda: tokenizers.append(load_tokenizer(info.tokenizer_directory)), groups.control)
        with heartbeat(f"reading the weights of {args.load}", on=bool(tokenizers)):
            star_model = load_model(args, info, groups, device, environment)
        budget = kv_budget(args, environment, groups, device)
        yield Job(groups, info, star_model, budget, next(iter(tokenizers), None))


def run_engine(job: Job, max_running: int, use: Callable[[StarEngine], None]) -> None:
    """On the driver, `use` an engine; the other ranks work for it until then.

    `use` first calls `from_driver` once, with whatever may fail because of the user's input.
    """
    if job.groups.control.rank():
        from_driver(lambda: None, job.groups.control)
        run_worker(job.star_model, job.groups.control)
        return
    engine = job.engine(max_running)
    use(engine)
    engine.stop()
