"""What ranks do with a mailbox, importable by their processes."""

import os
import random
import time
from contextlib import suppress
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_star.parallel.exchange import Exchange
from megatron_star.speed import mailbox
from megatron_star.speed.mailbox import LARGEST_BYTES, Mailbox

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def message(number: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The same for whoever makes it."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randint(-100, 100, (numel,), generator=generator).to(dtype)


def exchanged() -> tuple[int, int]:
    """Messages of all sizes, each rank late now and then; how many there were, and how many were wrong."""
    group, sizes, delays = dist.group.WORLD, random.Random(0), random.Random(dist.get_rank())
    box, num_wrong = Mailbox.open(group), 0
    for number in range(400):
        dtype = sizes.choice(DTYPES)
        numel = sizes.choice((1, 3, 585, LARGEST_BYTES // dtype.itemsize))
        if delays.random() < 0.1:
            time.sleep(delays.choice((0.0001, 0.003)))
        everyone = box.all_gather(message(number, group.rank(), numel, dtype))
        if delays.random() < 0.1:
            time.sleep(0.001)  # the others send their next message meanwhile
        expected = [message(number, rank, numel, dtype) for rank in range(group.size())]
        num_wrong += not torch.equal(everyone, torch.stack(expected))
    return box.num_messages, num_wrong


def opened_where_one_rank_has_no_such_memory() -> bool:
    """Whether this rank has no mailbox, as if the last one ran on another machine."""
    is_elsewhere = dist.get_rank() == dist.get_world_size() - 1
    with patch.object(mailbox, "_mapped", (lambda *_: None) if is_elsewhere else mailbox._mapped):
        return Mailbox.open(dist.group.WORLD) is None


def files_left_by_a_rank_that_fails_while_it_opens() -> list[str]:
    """New names in the memory's file system after an error between the ranks' steps of opening."""
    before = set(os.listdir("/dev/shm"))
    with patch.object(dist, "all_reduce", side_effect=RuntimeError("killed")), suppress(RuntimeError):
        Mailbox.open(dist.group.WORLD)
    return sorted(name for name in set(os.listdir("/dev/shm")) - before if "megatron" in name)


def sum_and_gather_of_both_ways() -> tuple[list, list]:
    """What an exchange adds up and gathers, with a mailbox and by collectives."""
    results = []
    between, mine = Exchange(dist.group.WORLD), message(0, dist.get_rank(), 90, torch.float32).view(2, 45)
    for between.small in (Mailbox.open(dist.group.WORLD), None):
        results.append([between.gather(mine).tolist(), between.add_up(mine.clone()).tolist()])
    return tuple(results)
