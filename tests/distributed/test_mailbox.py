"""Messages through shared memory are gloo's, whatever their sizes and however late a rank is."""

from pathlib import Path

import pytest
from distributed import run_ranks
from mailbox_ranks import exchanged, opened_where_one_rank_has_no_such_memory, sum_and_gather_of_both_ways

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
