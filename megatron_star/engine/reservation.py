"""What a job takes when it is let in: found as a whole before anything is changed, or not at all.

So a job that has to wait leaves no trace, and what runs never depends on who waited before.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_star.engine.job import CachedContext, ContextKey, Job
from megatron_star.engine.request import StarRequest
from megatron_star.planning.kv_memory import spare_capacity, tail_capacity
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import Planner


@dataclass(frozen=True)
class Reservation:
    """
    Attributes:
        num_reused: turns of the job whose contexts are there already; `base` is the last of them.
        plans: of the further turns, each on top of the one before, the first on top of `base`.
        dropped: unused contexts that make room for it, each before the one that it extends.
        tail_rank, tail_bytes: where the tail lives, and its memory there.
    """

    num_reused: int
    base: CachedContext | None
    plans: tuple[ContextPlan, ...]
    dropped: tuple[CachedContext, ...]
    tail_rank: int
    tail_bytes: int


@dataclass(frozen=True)
class KvMemory:
    """Bytes of KV on each CP rank: what things take, and how much there may be."""

    cp_size: int
    bytes_per_token: int
    budget: int

    def of_plans(self, plans: Collection[ContextPlan]) -> list[int]:
        """KV of what these plans encode, and its spare capacity, on each rank."""
        owned = ([plan.num_owned_tokens(rank) for plan in plans] for rank in range(self.cp_size))
        return [sum(n + spare_capacity(n) for n in of_rank) * self.bytes_per_token for of_rank in owned]

    def of_tail(self, request: StarRequest) -> int:
        """KV of query and generated tokens, on one rank."""
        tokens = len(request.query_tokens) + request.sampling.num_tokens_to_generate
        return tail_capacity(tokens) * self.bytes_per_token

    def with_tail(self, sizes: list[int], tail_bytes: int) -> tuple[int, int]:
        """The rank with most room, which takes the tail; and the most that a rank then holds."""
        tail_rank = min(range(self.cp_size), key=sizes.__getitem__)
        return tail_rank, max(*sizes, sizes[tail_rank] + tail_bytes)


class Reserver:
    """Finds reservations; changes nothing."""

    def __init__(self, planner: Planner, memory: KvMemory) -> None:
        self.planner, self.memory = planner, memory

    def most_bytes_alone(self, job: Job) -> int:
        """What the fullest rank holds while nothing but this job is there."""
        return self.memory.with_tail(self.memory.of_plans(job.plans), self.memory.of_tail(job.request))[1]

    def find(
        self, job: Job, contexts: Mapping[ContextKey, CachedContext], used: list[int]
    ) -> Reservation | None:
        """How this job can be let in now, or None.

        As many of its turns as can be are taken from `contexts`. Other waves divide a context differently
        over the ranks. So there are contexts on top of which the job would not fit even if it was alone: they
        are not used, but give way. Hence a job that fits alone is let in as soon as nothing else runs.

        Args:
            used: bytes of each rank that are taken.
        """
        for num_reused in range(len(job.keys), -1, -1):
            base = contexts.get(job.keys[num_reused - 1]) if num_reused else None
            if num_reused and not base:
                continue
            plans = self._plans_after(job, num_reused, base)
            needs, tail_bytes = self.memory.of_plans(plans), self.memory.of_tail(job.request)
            alone = _sum([needs, *(context.bytes_per_rank for context in base.chain())] if base else [needs])
            if self.memory.with_tail(alone, tail_bytes)[1] <= self.memory.budget:
                in_the_way = [contexts[key] for key in job.keys[num_reused:] if key in contexts]
                room = self._room(_sum([used, needs]), tail_bytes, contexts.values(), base, in_the_way)
                return Reservation(num_reused, base, plans, *room, tail_bytes) if room else None
        return None

    def _plans_after(self, job: Job, num_reused: int, base: CachedContext | None) -> tuple[ContextPlan, ...]:
        """Plans of the turns from `num_reused` on, on top of what the base was really encoded by."""
        if not base:
            return job.plans
        edges = [plan.num_tokens for plan in job.plans[num_reused:]]
        return self.planner.chain(edges, job.star, base.plan)

    def _room(
        self,
        sizes: list[int],
        tail_bytes: int,
        contexts: Collection[CachedContext],
        keep: CachedContext | None,
        in_the_way: Collection[CachedContext],
    ) -> tuple[tuple[CachedContext, ...], int] | None:
        """Unused contexts to drop, and the tail's rank; None if what is used leaves too little.

        What is in the way, or extends it, goes in any case; of the others, the least recently used go first.

        Args:
            sizes: bytes of each rank, with all contexts and with what is needed but for the tail.
        """
        users = {context: context.users for context in contexts}
        blocking, dropped = set(in_the_way), []
        while True:
            tail_rank, most = self.memory.with_tail(sizes, tail_bytes)
            if most <= self.memory.budget and not blocking:
                return tuple(dropped), tail_rank
            unused = [context for context, count in users.items() if not count and context is not keep]
            first = [context for context in unused if not blocking.isdisjoint(context.chain())]
            if not unused or (blocking and not first):
                return None
            dropped.append(min(first or unused, key=lambda context: context.last_use))
            sizes = _without(sizes, dropped[-1])
            blocking.discard(dropped[-1])
            del users[dropped[-1]]
            if dropped[-1].parent:
                users[dropped[-1].parent] -= 1


def _sum(sizes: Collection[list[int]]) -> list[int]:
    return [sum(of_rank) for of_rank in zip(*sizes, strict=True)]


def _without(sizes: list[int], context: CachedContext) -> list[int]:
    return [size - less for size, less in zip(sizes, context.bytes_per_rank, strict=True)]
