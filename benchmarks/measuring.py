"""What the benchmarks share: ranks, medians within rounds, and a result with its circumstances."""

import platform
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.models import add_random_model_argument, measured_model
from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.answer_files import AnswerFile
from megatron_star.job.argument_types import ArgumentParser
from megatron_star.job.environment import read_environment
from megatron_star.job.grid import Grid
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.session import exit_on_errors, process_groups
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.groups import StarGroups

PROGRAM = "benchmarks"


def run_on_ranks(
    prog: str,
    description: str,
    add_arguments: Callable[[ArgumentParser], None],
    run: Callable[[Namespace, StarModel, StarGroups], None],
) -> None:
    """Entry point of every rank: parse, form the groups, load the model, and `run`."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        parser = ArgumentParser(prog=prog, description=description)
        add_model_arguments(parser)
        add_random_model_argument(parser)
        parser.add_argument("--output", metavar="FILE")
        add_arguments(parser)
        args = parser.parse_args()
        if args.output and environment.is_driver:
            AnswerFile(args.output, PROGRAM, {}).close()  # what is wrong with it shows before the work
        cp_size = environment.world_size // args.tensor_model_parallel_size
        grid = replace(Grid.of_arguments(args), cp_size=cp_size)
        timeout = args.distributed_timeout_minutes
        with process_groups(environment, grid, timeout=timeout, backend=args.distributed_backend) as (
            groups,
            device,
        ):
            run(args, measured_model(args, groups, device), groups)


def over_ranks(value: float, operation: dist.ReduceOp, star_model: StarModel) -> float:
    """A number of each rank, reduced over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=star_model.device)
    dist.all_reduce(tensor, operation)
    return tensor.item()


def median_ratio(rounds: list[Mapping[str, Mapping[str, float]]], first: str, second: str, key: str) -> float:
    """The median, over the rounds, of one variant's figure divided by another's in the same round."""
    return statistics.median(r[first][key] / r[second][key] for r in rounds)


def measure_rounds[Round, Summary](
    args: Namespace, measure: Callable[[], Round], summarise: Callable[[list[Round]], Summary]
) -> Summary:
    """`--repeats` rounds, which all ranks run together, and their summary.

    Rank 0 writes the result after each, so that a run that is cut off leaves what it had.
    """
    rounds: list[Round] = []
    for _ in range(args.repeats):
        rounds.append(measure())
        if is_driver(dist.group.WORLD):
            write_result(args.output, summarise(rounds), rounds)
    return summarise(rounds)


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each figure of each variant."""
    return {
        name: {figure: statistics.median(r[name][figure] for r in rounds) for figure in figures}
        for name, figures in rounds[0].items()
    }


def write_result(path: str | None, summary: Any, rounds: Any) -> None:
    """A JSON file with the figures and what they were measured on; nothing without a path."""
    if not path:
        return
    result: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine_name(),
        "torch": torch.__version__,
        "num_ranks": dist.get_world_size(),
        "num_threads": torch.get_num_threads(),
        "summary": summary,
        "rounds": rounds,
    }
    with AnswerFile(path, PROGRAM, {}) as file:
        file.write(result)


def machine_name() -> str:
    """The GPU, or the processor as Linux names it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )
