"""Small tensors between the ranks of one machine, through memory that they share.

gloo hands every message to a thread of its own. Where that thread has to wake up for each layer of each
token, as in token generation on a CPU, this costs many times the message. Here a rank looks for itself.
"""

import mmap
import os
import platform
import secrets
from functools import lru_cache
from time import monotonic, sleep
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST_BYTES = 1 << 17
"""Of one rank's tensor."""

LOOKS_BEFORE_YIELDING = 200
SECONDS_BEFORE_SLEEPING = 0.05
SLEEP_SECONDS = 0.001
TIMEOUT_SECONDS = 600.0
TOKEN_BYTES = 32
PATH_BYTES = 64
_WORDS_APART = 8
"""Between two ranks' counters, so that they are in cache lines of their own."""


class Mailbox:
    """An all-gather for the CPU ranks of a group that run on one machine.

    Each rank has a counter and room for a tensor, both twice. For its n-th message it writes the tensor to
    room n % 2, then n to the counter, and waits for the others' counters. It cannot be two messages ahead of
    anybody, so nothing is overwritten before its reader sends the next one. Stores must be seen in their
    order, as on x86.
    """

    def __init__(self, memory: mmap.mmap, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks, self.num_messages = rank, num_ranks, 0
        words = 2 * num_ranks * _WORDS_APART
        self._counters = memoryview(memory).cast("q")[:words]
        rooms = torch.frombuffer(memory, dtype=torch.uint8)[8 * words : _num_bytes(num_ranks)]
        self._rooms = rooms.view(2, num_ranks, LARGEST_BYTES)
        self._everyones = lru_cache(maxsize=64)(self._view_of_rooms)  # the same few shapes in every layer

    @classmethod
    def open(cls, group: dist.ProcessGroup) -> Self | None:
        """A mailbox for all ranks of a group, which all call this; None, on all, if they share no memory."""
        rank, num_ranks = group.rank(), group.size()
        token = secrets.token_bytes(TOKEN_BYTES)
        descriptor = _new_memory(_num_bytes(num_ranks), token) if rank == 0 else None
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        try:
            told = torch.tensor(list(token + path.encode().ljust(PATH_BYTES)), dtype=torch.uint8)
            dist.broadcast(told, group=group, group_src=0)
            token, path = bytes(told[:TOKEN_BYTES].tolist()), bytes(told[TOKEN_BYTES:].tolist())
            memory = _mapped(path.decode().strip(), _num_bytes(num_ranks), token)
            all_have_it = torch.tensor(memory is not None, dtype=torch.int32)
            dist.all_reduce(all_have_it, dist.ReduceOp.MIN, group=group)
        finally:
            if descriptor is not None:
                os.close(descriptor)  # the memory lives on until nobody has it mapped
        return cls(memory, rank, num_ranks) if all_have_it else None

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is on a CPU and fits."""
        return tensor.is_cpu and tensor.nbytes <= LARGEST_BYTES

    def all_gather(self, mine: Tensor) -> Tensor:
        """[num_ranks, *mine.shape] of every rank's tensor of the same shape, up to LARGEST_BYTES.

        It is a view of the shared memory: to be read before this rank's next message, and not to be changed.

        Raises:
            RuntimeError: a rank has not come for TIMEOUT_SECONDS.
        """
        self.num_messages += 1
        half = self.num_messages % 2
        everyone, my_room = self._everyones(half, mine.shape, mine.dtype)
        my_room.copy_(mine)
        first = half * self.num_ranks
        self._counters[(first + self.rank) * _WORDS_APART] = self.num_messages
        for rank in range(self.num_ranks):
            if rank != self.rank:
                self._await(rank, (first + rank) * _WORDS_APART)
        return everyone

    def _view_of_rooms(self, half: int, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rooms of all ranks, and this rank's, as tensors of this shape."""
        rooms = self._rooms[half, :, : shape.numel() * dtype.itemsize]
        everyone = rooms.view(dtype).view(self.num_ranks, *shape)
        return everyone, everyone[self.rank]

    def _await(self, rank: int, place: int) -> None:
        counters, number = self._counters, self.num_messages
        for _ in range(LOOKS_BEFORE_YIELDING):
            if counters[place] >= number:
                return
        start = monotonic()
        while counters[place] < number:
            waited = monotonic() - start
            if waited > TIMEOUT_SECONDS:
                raise RuntimeError(f"CP rank {rank} has not come to message {number} for {waited:.0f} s")
            if waited > SECONDS_BEFORE_SLEEPING:
                sleep(SLEEP_SECONDS)
            else:
                os.sched_yield()


def _num_bytes(num_ranks: int) -> int:
    return 2 * num_ranks * (8 * _WORDS_APART + LARGEST_BYTES)


def _new_memory(num_bytes: int, token: bytes) -> int | None:
    """The descriptor of memory of zeros, and the token behind it; None where that cannot be had.

    It has no name, so whenever a rank is killed, nothing of it is left behind. The other ranks open it as the
    descriptor of this process.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        descriptor = os.memfd_create("megatron-star-mailbox")
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, num_bytes + TOKEN_BYTES)
        os.pwrite(descriptor, token, num_bytes)
    except OSError:  # no room
        os.close(descriptor)
        return None
    return descriptor


def _mapped(path: str, num_bytes: int, token: bytes) -> mmap.mmap | None:
    """The memory, if this process can see it; on another machine the path means something else or nothing."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.pread(descriptor, TOKEN_BYTES, num_bytes) != token:
            return None
        return mmap.mmap(descriptor, num_bytes + TOKEN_BYTES)
    except OSError:
        return None
    finally:
        os.close(descriptor)
