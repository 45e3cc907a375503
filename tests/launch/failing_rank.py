"""A job of which one rank raises while the others wait in a collective: `failing_rank.py RANK MESSAGE`."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_star.job.environment import read_environment
from megatron_star.job.grid import Grid
from megatron_star.job.session import exit_on_errors, process_groups
from megatron_star.parallel.control import on_every_rank


def fail(message: str) -> None:
    """A user's error on this rank alone."""
    raise ValueError(message)


environment = read_environment()
failing, kind = int(sys.argv[1]), sys.argv[2]
with (
    exit_on_errors(environment.rank),
    process_groups(
        environment, Grid(tp_size=1, cp_size=environment.world_size), timeout=timedelta(minutes=10)
    ) as (groups, _),
):
    mine = environment.rank == failing
    if kind == "checked":
        on_every_rank(lambda: fail("no checkpoint here") if mine else None, groups.control)
    if mine:
        raise RuntimeError("a bug in a kernel")
    dist.all_reduce(torch.ones(1), group=groups.cp)
