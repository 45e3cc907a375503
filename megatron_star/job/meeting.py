"""The ranks of a job find each other, and agree, before there is any group of them.

They meet at a store: torchrun's own where torchrun started them, else one that rank 0 serves at MASTER_ADDR
and MASTER_PORT. All waiting is done here, in Python, so that Ctrl-C ends it; it is bounded, and names who is
missing. Whatever is wrong on one rank is told to all of them.
"""

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from time import monotonic, sleep

import torch.distributed as dist

from megatron_star.job.environment import SET_BY_TORCHRUN, RankEnvironment
from megatron_star.parallel.control import DRIVER, SharedError, describe

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BEFORE_SAYING_SO = 10.0
SECONDS_FOR_READERS = 5.0
SECONDS_OF_A_CONNECTION = 5.0
MOST_CHARACTERS_SHOWN = 120


class RankError(ValueError):
    """An error of this rank alone, although no group exists yet."""


class Meeting:
    """The ranks of a job at their store. Every rank calls the same methods in the same order."""

    def __init__(self, environment: RankEnvironment, timeout: timedelta) -> None:
        """Reach the store.

        Raises:
            RankError: it cannot be reached within `timeout`, or another process has this rank's place.
        """
        self.rank, self.world_size, self.timeout = environment.rank, environment.world_size, timeout
        self._num_exchanges = 0
        self.store = _store(environment, timeout)
        if self.store.add(f"place of {self.rank}", 1) > 1:
            raise RankError(f"another process is rank {self.rank} of this job: is RANK the same for both?")

    def on_every_rank[T](self, function: Callable[[], T]) -> T:
        """What `function` returns here, once it has succeeded on every rank.

        Raises:
            SharedError: on every rank, with the message of the first that met a ValueError or OSError.
        """
        result, failure = None, ""
        try:
            result = function()
        except (ValueError, OSError) as error:
            failure = describe(error)
        failures = self.exchange(failure)
        failed = [rank for rank, message in enumerate(failures) if message]
        if failed:
            where = f"rank {failed[0]}: " if len(failed) < self.world_size else ""
            raise SharedError(where + failures[failed[0]])
        return result

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raises SharedError on all ranks, naming what differs and where, unless all have the same facts."""
        mine = {name: _shown(value) for name, value in facts.items()}
        everyones = [json.loads(text) for text in self.exchange(json.dumps(mine))]
        for name in dict.fromkeys(name for of_rank in everyones for name in of_rank):
            check_same_values(name, [of_rank.get(name, "nothing") for of_rank in everyones])

    def exchange(self, mine: str) -> list[str]:
        """The texts of all ranks, in their order.

        Raises:
            RankError: naming the ranks whose text is not there within the timeout.
        """
        self._num_exchanges += 1
        keys = [f"text {self._num_exchanges} of {rank}" for rank in range(self.world_size)]
        try:
            self.store.set(keys[self.rank], mine)
            self._await(keys)
            texts = [self.store.get(key).decode() for key in keys]
            num_readers = self.store.add(f"readers of {self._num_exchanges}", 1)
            # Where rank 0 serves the store, it stays until all have read.
            end = monotonic() + SECONDS_FOR_READERS
            while self.rank == DRIVER and num_readers < self.world_size and monotonic() < end:
                sleep(SECONDS_BETWEEN_LOOKS / 10)
                num_readers = self.store.add(f"readers of {self._num_exchanges}", 0)
        except dist.DistError as error:
            raise RankError(f"the ranks' store has gone, and rank 0 with it: {_first_line(error)}") from error
        return texts

    def _await(self, keys: list[str]) -> None:
        for _ in _looks(self.timeout, lambda: f"rank {self.rank} waits for {self._missing(keys)}"):
            if self.store.check(keys):
                return
        seconds = self.timeout.total_seconds()
        raise RankError(f"{self._missing(keys)} did not come within {seconds:.0f} s")

    def _missing(self, keys: list[str]) -> str:
        missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        return f"rank{'s' if len(missing) > 1 else ''} {_few(missing)}"


def check_same_values(name: str, values: list[str]) -> None:
    """Raises SharedError that names the ranks whose value is not that of rank 0, and what the first has."""
    others = [rank for rank, value in enumerate(values) if value != values[0]]
    if others:
        raise SharedError(
            f"rank {_few(map(str, others))}: other {name} than rank 0: "
            f"{values[others[0]]} instead of {values[0]}"
        )


def _few(ranks: Iterator[str] | list[str]) -> str:
    first, *rest = list(ranks)
    return ", ".join([first, *rest[:7]]) + (", ..." if len(rest) > 7 else "")


def _shown(value: str) -> str:
    if len(value) <= MOST_CHARACTERS_SHOWN:
        return value
    digest = hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:12]
    return f"{value[:MOST_CHARACTERS_SHOWN]}... ({len(value)} characters, SHA-256 {digest})"


def _looks(timeout: timedelta, waiting: Callable[[], str]) -> Iterator[None]:
    """Again and again until the timeout, with pauses. Says once what is waited for."""
    start, said = monotonic(), False
    while True:
        seconds = monotonic() - start
        yield
        if seconds > timeout.total_seconds():
            return
        if not said and seconds > SECONDS_BEFORE_SAYING_SO:
            print(waiting(), file=sys.stderr, flush=True)
            said = True
        sleep(SECONDS_BETWEEN_LOOKS)


def _store(environment: RankEnvironment, timeout: timedelta) -> dist.Store:
    if environment.world_size == 1:
        return dist.HashStore()
    where = environment.master_addr, environment.master_port
    try:
        socket.getaddrinfo(*where)  # torch would try for minutes
        if SET_BY_TORCHRUN in os.environ:
            return next(dist.rendezvous("env://", timeout=timeout))[0]
        if not environment.is_driver:
            _await_listener(environment, timeout)
        return dist.TCPStore(
            *where,
            environment.world_size,
            is_master=environment.is_driver,
            timeout=timeout,
            wait_for_workers=False,
        )
    except (socket.gaierror, dist.DistError) as error:
        raise RankError(_why_ranks_do_not_meet(environment, _first_line(error))) from error


def _await_listener(environment: RankEnvironment, timeout: timedelta) -> None:
    """Until rank 0 listens. Raises RankError if it does not within the timeout."""
    where = environment.master_addr, environment.master_port
    error: OSError | None = None
    for _ in _looks(timeout, lambda: f"rank {environment.rank} waits for rank 0 at {where[0]}:{where[1]}"):
        try:
            socket.create_connection(where, timeout=SECONDS_OF_A_CONNECTION).close()
            return
        except OSError as refusal:
            error = refusal
    message = f"rank 0 did not listen within {timeout.total_seconds():.0f} s ({error})"
    raise RankError(_why_ranks_do_not_meet(environment, message))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _why_ranks_do_not_meet(environment: RankEnvironment, message: str) -> str:
    where = f"{environment.master_addr} port {environment.master_port}"
    if "EADDRINUSE" in message:
        return f"cannot listen at {where}, which is in use: choose another with MASTER_PORT="
    return f"ranks do not meet at {where} (MASTER_ADDR, MASTER_PORT): {message}"
