"""Ranks that have no group yet: threads here, each with its own connection to a real store."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from megatron_star.job.environment import RankEnvironment
from megatron_star.job.meeting import Meeting, RankError

SOON, LATE = timedelta(seconds=0.5), timedelta(seconds=30)


@pytest.fixture
def port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def place(rank: int, world_size: int, port: int) -> RankEnvironment:
    return RankEnvironment(rank, world_size, rank, world_size, "127.0.0.1", port)


def on_ranks(world_size: int, port: int, function: Callable[[Meeting, int], Any]) -> list[Any]:
    """What `function` returns on each rank, or the message of its ValueError."""

    def run(rank: int) -> Any:
        try:
            return function(Meeting(place(rank, world_size, port), LATE), rank)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(run, range(world_size)))


def test_ranks_exchange_texts_as_often_as_they_like(port):
    def twice(meeting: Meeting, rank: int) -> list[list[str]]:
        return [meeting.exchange(f"{word} {rank}") for word in ("a", "b")]

    assert on_ranks(3, port, twice) == [[["a 0", "a 1", "a 2"], ["b 0", "b 1", "b 2"]]] * 3


def test_what_differs_is_named_on_all_ranks_with_both_values(port):
    def compare(meeting: Meeting, rank: int) -> None:
        meeting.check_same({"argument 1": "--load"})
        meeting.check_same({"argument 1": "--load", "argument 2": "--fp32" if rank < 2 else "--bf16"})

    message = "SharedError: rank 2: other argument 2 than rank 0: --bf16 instead of --fp32"
    assert on_ranks(3, port, compare) == [message] * 3


def test_an_argument_too_many_is_named(port):
    def compare(meeting: Meeting, rank: int) -> None:
        meeting.check_same({"argument 1": "x"} | ({"argument 2": "y"} if rank else {}))

    assert (
        on_ranks(2, port, compare)
        == ["SharedError: rank 1: other argument 2 than rank 0: y instead of nothing"] * 2
    )


def test_long_values_are_compared_whole_and_shown_in_part(port):
    def compare(meeting: Meeting, rank: int) -> None:
        meeting.check_same({"argument 1": "x" * 5000 + str(rank)})

    (message,) = set(on_ranks(2, port, compare))
    assert len(message) < 500 and "5001 characters" in message


@pytest.mark.parametrize("failing", [0, 2])
def test_what_fails_on_one_rank_fails_on_all_at_once(port, failing):
    def fail(meeting: Meeting, rank: int) -> None:
        def mine() -> None:
            if rank == failing:
                raise ValueError("local rank 7 has no GPU")

        meeting.on_every_rank(mine)

    assert on_ranks(3, port, fail) == [f"SharedError: rank {failing}: local rank 7 has no GPU"] * 3


def test_an_error_without_a_message_is_an_error(port):
    def fail(meeting: Meeting, rank: int) -> None:
        def mine() -> None:
            raise ValueError

        meeting.on_every_rank(mine)

    assert on_ranks(2, port, fail) == ["SharedError: ValueError"] * 2


def test_a_rank_that_does_not_come_is_named_within_the_timeout(port):
    with pytest.raises(RankError, match=r"ranks 1, 2 did not come within 0 s"):
        Meeting(place(0, 3, port), SOON).exchange("here")


def test_a_driver_that_does_not_come_is_named_within_the_timeout(port):
    with pytest.raises(RankError, match=rf"127.0.0.1 port {port} .*rank 0 did not listen within 0 s"):
        Meeting(place(1, 2, port), SOON)


def test_a_place_taken_twice_is_an_error_of_the_second(port):
    first = Meeting(place(0, 3, port), LATE)
    Meeting(place(1, 3, port), LATE)
    with pytest.raises(RankError, match="another process is rank 1 of this job"):
        Meeting(place(1, 3, port), LATE)
    assert first.rank == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_the_wait_for_other_ranks(port, rank):
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        Meeting(place(rank, 2, port), LATE).exchange("here")
    timer.join()
