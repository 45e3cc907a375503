"""What runs next, and what fits: the driver's bookkeeping. Knows no tensor and no process group.

Memory is counted in bytes of KV per CP rank. A context is reserved on all ranks when its first request is
admitted, a tail on one rank; both are given back when nothing uses them and the room is wanted.
"""

import hashlib
from array import array
from collections import deque
from dataclasses import dataclass
from itertools import count

from megatron_star.config import StarConfig
from megatron_star.inference.executor import Command
from megatron_star.inference.kv_store import tail_room
from megatron_star.inference.request import StarRequest
from megatron_star.plan import ContextPlan

ContextKey = tuple[bytes, tuple[int, ...], int, int]
MAX_TOKENS_FED_AT_ONCE = 512
"""Of one query in one step, so that a long query does not hold up the sequences beside it."""


def context_key(token_ids: list[int], plan: ContextPlan, star: StarConfig) -> ContextKey:
    """Equal for contexts with the same tokens and the same mask; waves and owners do not change a result."""
    digest = hashlib.sha256(array("q", token_ids).tobytes()).digest()
    if plan.num_blocks <= 1:
        return digest, (), 0, 0
    return digest, plan.block_edges, plan.anchor_size, star.neighbor_blocks


@dataclass(eq=False)
class CachedContext:
    """A context that is encoded, being encoded, or waiting for it. `users` are sequences that need it."""

    id: int
    key: ContextKey
    token_ids: list[int]
    star: StarConfig
    plan: ContextPlan
    bytes_per_rank: list[int]
    users: int = 0
    last_use: int = 0
    opened: bool = False
    next_wave: int = 0

    @property
    def encoded(self) -> bool:
        """All waves went through the model."""
        return self.opened and self.next_wave == len(self.plan.waves)


@dataclass(eq=False)
class Job:
    """A request on its way through the scheduler.

    Attributes:
        pending: tokens that are to be fed next: the query, then each generated token.
        opened: its sequence exists on the ranks.
    """

    id: int
    request: StarRequest
    mode: str
    star: StarConfig
    plan: ContextPlan
    key: ContextKey
    pending: list[int]
    context: CachedContext | None = None
    tail_rank: int = 0
    tail_bytes: int = 0
    opened: bool = False
    cache_hit: bool = False


class Scheduler:
    """Queues jobs, shares contexts, keeps within the budget, and says what the ranks do next."""

    def __init__(
        self, *, cp_size: int, kv_bytes_per_token: int, budget_bytes_per_rank: int, max_running: int = 64
    ) -> None:
        self.kv_bytes_per_token, self.budget = kv_bytes_per_token, budget_bytes_per_rank
        self.max_running = max_running
        self.used = [0] * cp_size
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.contexts: dict[ContextKey, CachedContext] = {}
        self._to_encode: deque[CachedContext] = deque()
        self._drop_sequences: list[int] = []
        self._drop_contexts: list[int] = []
        self._ids, self._clock = count(), count()

    def check_fits(self, job: Job) -> None:
        """Raises ValueError, with what it needs and what there is, if this job can never run."""
        needs = [self._context_bytes(job.plan, rank) for rank in range(len(self.used))]
        tail = self._tail_bytes(job.request)
        needs[min(range(len(needs)), key=needs.__getitem__)] += tail
        if max(needs) > self.budget:
            raise ValueError(
                f"{job.plan.num_tokens} context tokens and their answer need {max(needs):,} bytes of KV on a "
                f"rank, but the budget is {self.budget:,} bytes a rank: use more context-parallel ranks"
            )

    def add(self, job: Job) -> None:
        """Queue a job that fits in principle."""
        self.waiting.append(job)

    def admit(self) -> list[Job]:
        """Let waiting jobs in, in their order, as long as the next one fits; returns them."""
        admitted = []
        while self.waiting and len(self.running) < self.max_running and self._reserve(self.waiting[0]):
            job = self.waiting.popleft()
            self.running[job.id] = job
            admitted.append(job)
        return admitted

    def next_command(self) -> Command:
        """Free what was given up, feed every sequence whose context is ready, and encode one wave."""
        command = Command(drop_sequences=self._drop_sequences, drop_contexts=self._drop_contexts)
        self._drop_sequences, self._drop_contexts = [], []
        for job in self.running.values():
            if job.context.encoded and job.pending:
                if not job.opened:
                    command.open_sequences.append((job.id, job.context.id, job.tail_rank))
                    job.opened = True
                command.feed.append((job.id, job.pending[:MAX_TOKENS_FED_AT_ONCE]))
                job.pending = job.pending[MAX_TOKENS_FED_AT_ONCE:]
        self._encode_into(command)
        return command

    def remove(self, job: Job) -> None:
        """A job has ended, in whatever way; it may still be waiting."""
        if job.id not in self.running:
            self.waiting.remove(job)
            return
        del self.running[job.id]
        self.used[job.tail_rank] -= job.tail_bytes
        if job.opened:
            self._drop_sequences.append(job.id)
        job.context.users -= 1
        if not job.context.users and not job.context.encoded:
            self._drop(job.context)

    @property
    def idle(self) -> bool:
        """There is nothing to do, and nothing to tell the ranks."""
        return not (self.waiting or self.running or self._drop_sequences or self._drop_contexts)

    def drop_unused_contexts(self) -> None:
        """Forget every context that no sequence uses."""
        for context in [context for context in self.contexts.values() if not context.users]:
            self._drop(context)

    def _encode_into(self, command: Command) -> None:
        if not self._to_encode:
            return
        context = self._to_encode[0]
        if not context.opened:
            command.open_context = context.id, context.token_ids, context.star
            context.opened = True
        if context.next_wave < len(context.plan.waves):
            command.encode_wave = context.id, context.next_wave
            context.next_wave += 1
        if context.encoded:
            self._to_encode.popleft()

    def _reserve(self, job: Job) -> bool:
        """Take what the job needs, dropping unused contexts for it, oldest first; False if in vain."""
        context = self.contexts.get(job.key)
        needs = [0 if context else self._context_bytes(job.plan, rank) for rank in range(len(self.used))]
        tail_bytes = self._tail_bytes(job.request)
        tail_rank = min(range(len(needs)), key=lambda rank: self.used[rank] + needs[rank])
        needs[tail_rank] += tail_bytes
        if not self._make_room(needs, keep=context):
            return False
        job.tail_rank, job.tail_bytes, job.cache_hit = tail_rank, tail_bytes, context is not None
        if context is None:
            needs[tail_rank] -= tail_bytes
            tokens = job.request.context_tokens
            context = CachedContext(next(self._ids), job.key, tokens, job.star, job.plan, needs)
            self.contexts[job.key] = context
            self._to_encode.append(context)
            self._add(needs)
        self.used[tail_rank] += tail_bytes
        job.context = context
        context.users += 1
        context.last_use = next(self._clock)
        return True

    def _make_room(self, needs: list[int], keep: CachedContext | None) -> bool:
        unused = [c for c in self.contexts.values() if not c.users and c is not keep]
        unused.sort(key=lambda context: context.last_use)
        while any(used + need > self.budget for used, need in zip(self.used, needs, strict=True)):
            if not unused:
                return False
            self._drop(unused.pop(0))
        return True

    def _drop(self, context: CachedContext) -> None:
        del self.contexts[context.key]
        if context in self._to_encode:
            self._to_encode.remove(context)
        if context.opened:
            self._drop_contexts.append(context.id)
        self._add([-size for size in context.bytes_per_rank])

    def _add(self, sizes: list[int]) -> None:
        self.used = [used + size for used, size in zip(self.used, sizes, strict=True)]

    def _context_bytes(self, plan: ContextPlan, rank: int) -> int:
        return plan.num_owned_tokens(rank) * self.kv_bytes_per_token

    def _tail_bytes(self, request: StarRequest) -> int:
        tokens = len(request.query_tokens) + request.sampling.num_tokens_to_generate
        return tail_room(tokens) * self.kv_bytes_per_token
