"""Messages through shared memory are gloo's, whatever their sizes and however late a rank is."""

from pathlib import Path

import pytest
from distributed import run_ranks
from mailbox_ranks import (
    exchanged,
    files_left_by_a_rank_that_fails_while_it_opens,
    opened_where_one_rank_has_no_such_memory,
    sum_and_gather_of_both_ways,
)

from megatron_star.speed import mailbox

SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_gets_what_every_rank_sent(num_ranks):
    before = set(SHARED_MEMORY.iterdir())
    for num_messages, num_wrong in run_ranks(num_ranks, exchanged):
        assert (num_messages, num_wrong) == (400, 0)
    assert not [path for path in set(SHARED_MEMORY.iterdir()) - before if "megatron-star" in path.name]


def test_there_is_none_where_a_rank_does_not_have_the_memory():
    assert run_ranks(3, opened_where_one_rank_has_no_such_memory) == [True, True, True]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_exchange_gives_the_same_with_a_mailbox_and_without(num_ranks):
    for with_mailbox, without in run_ranks(num_ranks, sum_and_gather_of_both_ways):
        assert with_mailbox == without


def test_a_rank_that_ends_while_it_opens_leaves_no_memory_behind():
    assert run_ranks(1, files_left_by_a_rank_that_fails_while_it_opens) == [[]]


@pytest.mark.parametrize("content", [b"", b"x" * 100_000])
def test_what_has_the_same_path_elsewhere_is_not_taken_for_the_memory(tmp_path, content):
    (tmp_path / "3").write_bytes(content)
    assert mailbox._mapped(str(tmp_path / "3"), 1000, b"t" * 32) is None
    assert mailbox._mapped(str(tmp_path / "4"), 1000, b"t" * 32) is None
