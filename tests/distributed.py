"""Run a function on gloo ranks inside an ordinary test.

The ranks are processes that live as long as the test session: importing torch and Megatron takes seconds,
forming a group takes milliseconds. A task that fails or hangs takes its ranks with it; the next task starts
new ones. They are forked from a server that has imported all that, and has no threads.
"""

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

MAX_RANKS = 6
RANK_TIMEOUT_SECONDS = 120


class RankError(AssertionError):
    """A rank raised; carries its traceback."""


def _process_context() -> BaseContext:
    """Of the ranks. Imports ask CUDA for its devices, and who has asked cannot be forked."""
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    # Python 3.12 gives the server no sys.path, and it says nothing of what it cannot import.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


class _Rank:
    def __init__(self) -> None:
        context = _process_context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


_ranks: list[_Rank] = []


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on `world_size` ranks with torch.distributed over gloo; what each returned.

    `function` must be importable from its module. Raises RankError if a rank raises or does not answer.
    """
    assert 1 <= world_size <= MAX_RANKS
    while len(_ranks) < world_size:
        _ranks.append(_Rank())
    port = _free_port()
    for rank in range(world_size):
        _ranks[rank].connection.send(list(sys.path))  # before the function, which is unpickled by its module
        _ranks[rank].connection.send((rank, world_size, port, function, args))
    try:
        return _collect([_ranks[rank].connection for rank in range(world_size)])
    except BaseException:
        _stop()
        raise


def _collect(connections: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        pending = [c for i, c in enumerate(connections) if i not in results]
        ready = wait(pending, RANK_TIMEOUT_SECONDS)
        if not ready:
            missing = sorted(set(range(len(connections))) - set(results))
            raise RankError(f"no answer from ranks {missing} within {RANK_TIMEOUT_SECONDS} s")
        for connection in ready:
            rank = connections.index(connection)
            succeeded, result = connection.recv()
            if not succeeded:
                raise RankError(f"rank {rank}:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(connections))]


def _serve(connection: Connection) -> None:
    import rank_imports  # noqa: F401, PLC0415

    while True:
        try:
            sys.path[:] = connection.recv()
            rank, world_size, port, function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _run(rank, world_size, port, function, args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _run(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> Any:
    import torch.distributed as dist  # noqa: PLC0415

    from megatron_star.parallel.groups import destroy_groups  # noqa: PLC0415

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        return function(*args)
    finally:
        destroy_groups()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@atexit.register
def _stop() -> None:
    while _ranks:
        process = _ranks.pop().process
        process.kill()
        process.join()
