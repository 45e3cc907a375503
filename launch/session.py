"""Start and end of a process of a job: its groups, and what happens when something goes wrong."""

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import sleep
from typing import NoReturn

import torch
import torch.distributed as dist

from launch.code_version import check_same_code
from launch.environment import RankEnvironment
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.control import SharedError, describe
from megatron_star.parallel.groups import (
    StarGroups,
    backend_for,
    check_world_size,
    destroy_groups,
    initialize_groups,
)
from megatron_star.parallel.watch import RankWatch

USER_ERROR_STATUS = 2
FAILURE_STATUS = 1
SECONDS_FOR_THE_WATCH = 2.0
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class RankError(ValueError):
    """An error of this rank alone, although no group exists yet."""


@contextmanager
def exit_on_errors(rank: int) -> Iterator[None]:
    """End this process at once with one line on an error, so that no other rank waits for it.

    Errors of the user's input (ValueError, OSError) end with status 2, others with 1 and a traceback. An
    error that all ranks have is reported by rank 0 alone.
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
        if rank == 0:
            print("error: interrupted; what was written before is kept", file=sys.stderr)
        _end(FAILURE_STATUS)
    if isinstance(error, ValueError | OSError):
        alone = isinstance(error, RankError) or dist.is_initialized()
        everywhere = isinstance(error, SharedError) or not alone
        if rank == 0 or not everywhere:
            where = "" if everywhere else f"rank {rank}: "
            print(f"error: {where}{' '.join(describe(error).split())}", file=sys.stderr)
        _end(USER_ERROR_STATUS)
    if any(sign in str(error) for sign in PEER_ENDED):
        sleep(SECONDS_FOR_THE_WATCH)  # it names the rank that ended, and ends this process
        print(f"error: rank {rank} stops, because another rank ended", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"error: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
    _end(FAILURE_STATUS)


def _end(status: int) -> NoReturn:
    """Without clean-up: tearing down a group waits for ranks that may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def process_groups(
    environment: RankEnvironment, *, tp_size: int, cp_size: int, timeout: timedelta
) -> Iterator[tuple[StarGroups, torch.device]]:
    """The groups of this job and the device of this rank, for the time of a `with` block.

    Raises:
        ValueError: TP x CP is not the number of ranks, or they do not meet at their address.
        SharedError: the ranks do not run the same code.
    """
    check_world_size(environment.world_size, tp_size=tp_size, cp_size=cp_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.device_index(torch.cuda.device_count()))
    device = use_cpu_where_cuda_is_absent()
    _join(environment, backend_for(device), timeout)
    groups = initialize_groups(tp_size=tp_size, cp_size=cp_size, timeout=timeout)
    watch = RankWatch(groups.control, environment.master_addr)
    try:
        check_same_code(groups.control)
        yield groups, device
    except SharedError:
        watch.close()
        raise
    watch.close()
    dist.barrier(groups.control)
    destroy_groups()


def _join(environment: RankEnvironment, backend: str, timeout: timedelta) -> None:
    if environment.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    # torchrun's own store is used where it started this process; it listens at the same address.
    os.environ |= {
        "MASTER_ADDR": environment.master_addr,
        "MASTER_PORT": str(environment.master_port),
        "RANK": str(environment.rank),
        "WORLD_SIZE": str(environment.world_size),
    }
    try:
        socket.getaddrinfo(environment.master_addr, environment.master_port)  # torch would try for minutes
        dist.init_process_group(backend, timeout=timeout)
    except (socket.gaierror, dist.DistNetworkError, dist.DistStoreError) as error:
        raise RankError(_why_ranks_do_not_meet(environment, str(error))) from error


def _why_ranks_do_not_meet(environment: RankEnvironment, message: str) -> str:
    where = f"{environment.master_addr} port {environment.master_port}"
    if "EADDRINUSE" in message:
        return f"cannot listen at {where}, which is in use: choose another with MASTER_PORT="
    return f"ranks do not meet at {where} (MASTER_ADDR, MASTER_PORT): {message.splitlines()[0]}"
