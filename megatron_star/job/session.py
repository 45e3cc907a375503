"""Start and end of a process of a job: its groups, and what happens when something goes wrong."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from time import sleep
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_star.job.code_version import facts_of_code
from megatron_star.job.devices import check_gpus_differ, take_device
from megatron_star.job.environment import RankEnvironment
from megatron_star.job.grid import Grid
from megatron_star.job.interrupts import heeded_interrupts
from megatron_star.job.meeting import Meeting, RankError
from megatron_star.parallel.control import DRIVER, SharedError, describe
from megatron_star.parallel.groups import (
    StarGroups,
    destroy_groups,
    initialize_groups,
)
from megatron_star.parallel.watch import RankWatch

USER_ERROR_STATUS = 2
FAILURE_STATUS = 1
SECONDS_FOR_THE_WATCH = 2.0
SECONDS_FOR_RANK_0 = 1.0
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def exit_on_errors(rank: int) -> Iterator[None]:
    """End this process at once with one line on an error, so that no other rank waits for it.

    Errors of the user's input (ValueError, OSError) end with status 2, others with 1 and a traceback. An
    error that all ranks share is reported by rank 0 alone. Before the ranks have met, every rank says why it
    ends: a launcher kills the others when the first one ends, and nobody knows which one that is.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        end_process(rank, error)


def end_process(rank: int, error: BaseException) -> NoReturn:
    """What `exit_on_errors` does with an error; for threads, which it does not see."""
    if isinstance(error, KeyboardInterrupt):
        if rank == DRIVER:
            print("error: interrupted; what was written before is kept", file=sys.stderr)
        _end(FAILURE_STATUS)
    if isinstance(error, ValueError | OSError):
        if isinstance(error, SharedError) and rank:
            _let_launchers_end(USER_ERROR_STATUS)
            sleep(SECONDS_FOR_RANK_0)  # it says so, and a launcher ends it as soon as another rank has ended
            _end(USER_ERROR_STATUS)
        alone = isinstance(error, RankError) or dist.is_initialized() or rank
        where = f"rank {rank}: " if alone and not isinstance(error, SharedError) else ""
        print(f"error: {where}{' '.join(describe(error).split())}", file=sys.stderr)
        _end(USER_ERROR_STATUS)
    if any(sign in str(error) for sign in PEER_ENDED):
        _let_launchers_end(FAILURE_STATUS)
        sleep(SECONDS_FOR_THE_WATCH)  # it names the rank that ended, and ends this process
        print(f"error: rank {rank} stops, because another rank ended", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"error: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
    _end(FAILURE_STATUS)


def _let_launchers_end(status: int) -> None:
    """A launcher that ends this rank from now on, since another one has ended, gets this status from it."""
    with suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGTERM, lambda *_: _end(status))


def _end(status: int) -> NoReturn:
    """Without clean-up: tearing down a group waits for ranks that may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def process_groups(
    environment: RankEnvironment,
    grid: Grid,
    *,
    timeout: timedelta,
    backend: str | None = None,
) -> Iterator[tuple[StarGroups, torch.device]]:
    """The groups of this job and the device of this rank, for the time of a `with` block.

    The ranks meet and agree on what they are before they form any group; from then on a watch notices when
    one of them ends.

    Raises:
        RankError: they do not meet at their address.
        SharedError: TP x CP is not the number of ranks, experts cannot be spread over them, a rank has no
            device, they do not run the same code with the same arguments, or two have one GPU.
    """
    with heeded_interrupts():
        yield from _groups(environment, grid, timeout, backend)


def _groups(
    environment: RankEnvironment, grid: Grid, timeout: timedelta, backend: str | None
) -> Iterator[tuple[StarGroups, torch.device]]:
    meeting = Meeting(environment, timeout)
    address = environment.master_addr
    watch = RankWatch(
        meeting.store, environment.rank, environment.world_size, address, longest_silence=timeout
    )
    try:
        facts = facts_of_code(sys.argv[1:]) | {"sizes of groups": str(grid)}
        meeting.check_same(facts)
        meeting.on_every_rank(lambda: grid.check(environment.world_size))
        device, backend = meeting.on_every_rank(lambda: take_device(environment, backend))
        meeting.check_same({"kind of device": device.type, "backend": backend})
        dist.init_process_group(
            backend,
            store=meeting.store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
        groups = replace(initialize_groups(**grid.sizes, timeout=timeout), watch=watch)
        check_gpus_differ(device, backend, groups.control)
        yield groups, device
    except SharedError:
        watch.close()
        raise
    watch.close()
    dist.barrier(groups.control)
    destroy_groups()
