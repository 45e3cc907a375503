"""How fast this machine's memory is read by one rank alone, and by all ranks at once.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/memory_bandwidth.py --load .demo/megatron

Token generation reads weights and KV once a token. Ranks that share a memory cannot gain more than it gives.
"""

import sys
from argparse import Namespace
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.measuring import measure_rounds, medians, over_ranks, run_on_ranks
from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.argument_types import ArgumentParser
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.groups import StarGroups

GIGABYTE = 10**9


def measure(star_model: StarModel, values: torch.Tensor, *, together: bool) -> float:
    """Gigabytes a second, of all ranks that read."""
    dist.barrier()
    start = perf_counter()
    if together or is_driver(dist.group.WORLD):
        values.sum()
    star_model.synchronize()
    seconds = over_ranks(perf_counter() - start, dist.ReduceOp.MAX, star_model)
    return values.nbytes * (dist.get_world_size() if together else 1) / seconds / GIGABYTE


def run(args: Namespace, star_model: StarModel, _: StarGroups) -> None:
    """All rounds, and the result on rank 0."""
    values = torch.ones(GIGABYTE // 2 // 4, device=star_model.device)
    summary = measure_rounds(
        args,
        lambda: {
            name: {"gigabytes_per_s": measure(star_model, values, together=together)}
            for name, together in (("one rank", False), ("all ranks", True))
        },
        medians,
    )
    if not is_driver(dist.group.WORLD):
        return
    for name, figures in summary.items():
        print(f"{name:<12}{figures['gigabytes_per_s']:>8.1f} GB/s")


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--repeats", type=int, default=9, metavar="N")


if __name__ == "__main__":
    run_on_ranks("memory_bandwidth.py", __doc__.splitlines()[0], add_arguments, run)
