"""What runs next, and what fits: the driver's bookkeeping. Knows no tensor and no process group.

Memory is counted in bytes of KV per CP rank. A context is reserved on all ranks when its first request is
admitted, a tail on one rank; both are given back when nothing uses them and the room is wanted.
"""

import hashlib
import sys
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Self

from megatron_star.config import StarConfig
from megatron_star.inference.executor import Command
from megatron_star.inference.kv_store import room_behind, tail_room
from megatron_star.inference.request import StarRequest
from megatron_star.plan import ContextPlan, TokenCosts

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
    """A context that is encoded, being encoded, or waiting for it.

    `users` are the sequences that need it, and the contexts that extend it.
    """

    id: int
    key: ContextKey
    token_ids: list[int]
    star: StarConfig
    plan: ContextPlan
    parent: Self | None
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
        plans: of its context, and before it of each earlier turn's context, which the next one extends.
        pending: tokens that are to be fed next: the query, then each generated token.
        opened: its sequence exists on the ranks.
        is_answering: its query went through the model, and what is pending is a generated token.
    """

    id: int
    request: StarRequest
    mode: str
    star: StarConfig
    plans: list[ContextPlan]
    keys: list[ContextKey]
    pending: list[int]
    context: CachedContext | None = None
    tail_rank: int = 0
    tail_bytes: int = 0
    opened: bool = False
    is_answering: bool = False
    num_cached_tokens: int = 0

    @property
    def plan(self) -> ContextPlan:
        """The plan of the whole context."""
        return self.plans[-1]


class Scheduler:
    """Queues jobs, shares contexts, keeps within the budget, and says what the ranks do next."""

    def __init__(
        self,
        costs: TokenCosts,
        *,
        cp_size: int,
        kv_bytes_per_token: int,
        budget_bytes_per_rank: int,
        max_running: int = 64,
    ) -> None:
        self.costs = costs
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
        needs = self._bytes_of(job.plans)
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

    @property
    def answering(self) -> bool:
        """A sequence waits for its next token, after others."""
        return any(job.is_answering for job in self.running.values())

    @property
    def encoding(self) -> bool:
        """The next command has a wave."""
        return bool(self._to_encode)

    def recut_next(self, bounded: Callable[[CachedContext], tuple[StarConfig, ContextPlan]]) -> None:
        """Let the context that is encoded next have the waves that `bounded` allows by now.

        Nothing is changed if it is being encoded already, if another context extends it, or without room.
        """
        context = self._to_encode[0] if self._to_encode else None
        if not context or context.opened or any(c.parent is context for c in self.contexts.values()):
            return
        star, plan = bounded(context)
        sizes = self._bytes_of([plan])
        more = [new - old for new, old in zip(sizes, context.bytes_per_rank, strict=True)]
        if all(used + extra <= self.budget for used, extra in zip(self.used, more, strict=True)):
            self._add(more)
            context.star, context.plan, context.bytes_per_rank = star, plan, sizes

    def next_command(self, most_query_tokens: int = sys.maxsize) -> Command:
        """Free what was given up, feed sequences whose context is ready, and encode one wave.

        Every sequence that is answered gets its token; those that begin share `most_query_tokens`.
        """
        command = Command(drop_sequences=self._drop_sequences, drop_contexts=self._drop_contexts)
        self._drop_sequences, self._drop_contexts = [], []
        for job in self.running.values():
            most = 1 if job.is_answering else min(MAX_TOKENS_FED_AT_ONCE, most_query_tokens)
            if job.context.encoded and job.pending and most:
                if not job.opened:
                    command.open_sequences.append((job.id, job.context.id, job.tail_rank))
                    job.opened = True
                if not job.is_answering:
                    most_query_tokens -= len(job.pending[:most])
                command.feed.append((job.id, job.pending[:most]))
                job.pending = job.pending[most:]
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
        self._give_up(job.context)

    @property
    def idle(self) -> bool:
        """There is nothing to do, and nothing to tell the ranks."""
        return not (self.waiting or self.running or self._drop_sequences or self._drop_contexts)

    def drop_unused_contexts(self) -> None:
        """Forget every context that no sequence uses."""
        while unused := [context for context in self.contexts.values() if not context.users]:
            self._drop(unused[0])

    def _encode_into(self, command: Command) -> None:
        if not self._to_encode:
            return
        context = self._to_encode[0]
        if not context.opened:
            parent_id = context.parent.id if context.parent else None
            command.open_context = context.id, context.token_ids, context.star, parent_id
            context.opened = True
        if context.next_wave < len(context.plan.waves):
            command.encode_wave = context.id, context.next_wave
            context.next_wave += 1
        if context.encoded:
            self._to_encode.popleft()

    def _reserve(self, job: Job) -> bool:
        """Take what the job needs, dropping unused contexts for it, oldest first; False if in vain."""
        num_reused, context = self._longest_cached(job)
        self._replan(job, num_reused, context)
        needs = self._bytes_of(job.plans[num_reused:])
        tail_bytes = self._tail_bytes(job.request)
        tail_rank = min(range(len(needs)), key=lambda rank: self.used[rank] + needs[rank])
        needs[tail_rank] += tail_bytes
        if not self._make_room(needs, keep=context):
            return False
        job.tail_rank, job.tail_bytes = tail_rank, tail_bytes
        job.num_cached_tokens = context.plan.num_tokens if context else 0
        self.used[tail_rank] += tail_bytes
        for plan, key in zip(job.plans[num_reused:], job.keys[num_reused:], strict=True):
            context = self._new_context(job, plan, key, parent=context)
        context.users += 1
        context.last_use = next(self._clock)
        job.context = context
        return True

    def _longest_cached(self, job: Job) -> tuple[int, CachedContext | None]:
        """How many of the job's turns are encoded, or being encoded, already; and the context of the last."""
        for index in range(len(job.keys) - 1, -1, -1):
            if context := self.contexts.get(job.keys[index]):
                return index + 1, context
        return 0, None

    def _replan(self, job: Job, num_reused: int, context: CachedContext | None) -> None:
        """Let the job's remaining plans extend the plan that the reused context was really encoded by."""
        if context is None or context.plan is job.plans[num_reused - 1]:
            return
        job.plans[num_reused - 1] = context.plan
        for index in range(num_reused, len(job.plans)):
            num_tokens, base = job.plans[index].num_tokens, job.plans[index - 1]
            job.plans[index] = ContextPlan.build(num_tokens, base.cp_size, job.star, self.costs, base)

    def _new_context(
        self, job: Job, plan: ContextPlan, key: ContextKey, parent: CachedContext | None
    ) -> CachedContext:
        tokens, sizes = job.request.context_tokens[: plan.num_tokens], self._bytes_of([plan])
        context = CachedContext(next(self._ids), key, tokens, job.star, plan, parent, sizes)
        context.last_use = next(self._clock)
        if parent:
            parent.users += 1
        self.contexts[key] = context
        self._to_encode.append(context)
        self._add(sizes)
        return context

    def _make_room(self, needs: list[int], keep: CachedContext | None) -> bool:
        while any(used + need > self.budget for used, need in zip(self.used, needs, strict=True)):
            unused = [c for c in self.contexts.values() if not c.users and c is not keep]
            if not unused:
                return False
            self._drop(min(unused, key=lambda context: context.last_use))
        return True

    def _give_up(self, context: CachedContext) -> None:
        """One user fewer; what is not encoded yet and has no user left is not worth encoding."""
        context.users -= 1
        if not context.users and not context.encoded:
            self._drop(context)

    def _drop(self, context: CachedContext) -> None:
        del self.contexts[context.key]
        if context in self._to_encode:
            self._to_encode.remove(context)
        if context.opened:
            self._drop_contexts.append(context.id)
        self._add([-size for size in context.bytes_per_rank])
        if context.parent:
            self._give_up(context.parent)

    def _add(self, sizes: list[int]) -> None:
        self.used = [used + size for used, size in zip(self.used, sizes, strict=True)]

    def _bytes_of(self, plans: list[ContextPlan]) -> list[int]:
        """KV of what these plans encode, and the room behind it, on each rank."""
        owned = ([plan.num_owned_tokens(rank) for plan in plans] for rank in range(len(self.used)))
        return [sum(n + room_behind(n) for n in of_rank) * self.kv_bytes_per_token for of_rank in owned]

    def _tail_bytes(self, request: StarRequest) -> int:
        tokens = len(request.query_tokens) + request.sampling.num_tokens_to_generate
        return tail_room(tokens) * self.kv_bytes_per_token
