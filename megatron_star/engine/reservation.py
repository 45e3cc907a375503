"""What a request takes when it is admitted: found as a whole before anything is changed, or not at all.

So a request that has to wait leaves no trace, and what runs never depends on who waited before.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from megatron_star.engine.base_context import Bases
from megatron_star.engine.cached_context import CachedContext, ContextKey
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import MOST_LINKS, Planner


@dataclass(frozen=True)
class Reservation:
    """
    Attributes:
        base, num_reused: a context that is there already, and how many of its first tokens are used.
        plans: of the contexts that are to be encoded, each on top of the one before, the first on top of
            that; none if `base` is the request's context.
        dropped: unused contexts whose memory it takes, each before the one that it extends.
        tail_rank, tail_bytes: where the tail lives, and its memory there.
    """

    base: CachedContext | None
    num_reused: int
    plans: tuple[ContextPlan, ...]
    dropped: tuple[CachedContext, ...]
    tail_rank: int
    tail_bytes: int


@dataclass(frozen=True)
class KvMemory:
    """Bytes of KV on each CP rank: what things take, and how much there may be."""

    cp_size: int
    layers: KvLayers
    budget: int

    def of_plans(self, plans: Collection[ContextPlan]) -> list[int]:
        """KV of what these plans encode, and its spare capacity, on each rank."""
        return _sum([[0] * self.cp_size, *(self.layers.of_context(plan) for plan in plans)])

    def of_tail(self, request: ScheduledRequest) -> int:
        """KV of query and generated tokens, on one rank."""
        return self.layers.of_tail(request.num_tail_tokens)

    def by_kind(self, request: ScheduledRequest) -> dict[str, int]:
        """KV of a request's context and tail on all ranks, by kind of layer; 0 before it is admitted."""
        plans = [context.plan for context in request.context.chain()] if request.context else []
        return self.layers.by_kind(plans, request.num_tail_tokens if request.context else 0)

    def with_tail(self, sizes: list[int], tail_bytes: int) -> tuple[int, int]:
        """The rank that holds least, which takes the tail; and the most that a rank then holds."""
        tail_rank = min(range(self.cp_size), key=sizes.__getitem__)
        return tail_rank, max(*sizes, sizes[tail_rank] + tail_bytes)


@dataclass(frozen=True)
class Room:
    """
    Attributes:
        budget: bytes of each rank.
        sizes: bytes of each rank, with all contexts and with what is needed but for the tail.
        tail_bytes: of that.
    """

    budget: int
    sizes: list[int]
    tail_bytes: int


class Reserver:
    """Finds reservations; changes nothing."""

    def __init__(self, planner: Planner, memory: KvMemory) -> None:
        self.planner, self.memory = planner, memory
        self._bases = Bases(planner, [mask for mask in memory.layers.num_layers if mask])

    def most_bytes_alone(self, request: ScheduledRequest) -> int:
        """What the fullest rank holds while nothing but this request is there."""
        contexts = self.memory.of_plans(request.planned.plans)
        return self.memory.with_tail(contexts, self.memory.of_tail(request))[1]

    def find(
        self,
        request: ScheduledRequest,
        contexts: Mapping[ContextKey, CachedContext],
        used: list[int],
        budget: int,
    ) -> Reservation | None:
        """How this request can be admitted now, or None.

        As many of its first tokens as can be are taken from `contexts`. Other waves divide a context
        differently over the ranks. So there are contexts on top of which the request would not fit even if it
        was alone: they are not used, but dropped. Hence one that fits alone is admitted as soon as nothing
        else runs.

        Args:
            used: bytes of each rank that are taken.
            budget: of each rank, for all; that of the memory, or less.
        """
        for base, num_reused in (*self._bases.of(request, contexts), (None, 0)):
            plans = self._plans_after(request, base, num_reused)
            chain = list(base.chain()) if base else []
            in_the_way = [contexts[key] for p in plans if (key := request.keys[p.num_tokens]) in contexts]
            needs, tail_bytes = self.memory.of_plans(plans), self.memory.of_tail(request)
            alone = _sum([needs, *(context.bytes_per_rank for context in chain)])
            fits_alone = self.memory.with_tail(alone, tail_bytes)[1] <= self.memory.budget
            if fits_alone and not any(context in chain for context in in_the_way):
                room = Room(budget, _sum([used, needs]), tail_bytes)
                found = self._with_space(room, contexts.values(), base, in_the_way)
                return Reservation(base, num_reused, plans, *found, tail_bytes) if found else None
        return None

    def _plans_after(
        self, request: ScheduledRequest, base: CachedContext | None, num_reused: int
    ) -> tuple[ContextPlan, ...]:
        """Plans of what follows the first tokens of `base`, on top of what these were really encoded by."""
        planned = request.planned
        if not base:
            return planned.plans
        if base.key == request.key:
            return ()
        ends = self.planner.ends(planned.edges, num_reused, MOST_LINKS - base.num_links)
        return self.planner.chain(ends, planned.star, base.plan.prefix(num_reused), planned.plan.mask)

    def _with_space(
        self,
        room: Room,
        contexts: Collection[CachedContext],
        keep: CachedContext | None,
        in_the_way: Collection[CachedContext],
    ) -> tuple[tuple[CachedContext, ...], int] | None:
        """Unused contexts to drop, and the tail's rank; None if what is used leaves too little.

        What is in the way, or extends it, goes in any case; of the others, those of the tenant that holds
        most by its share, and of these the least recently used, go first.
        """
        sizes, held = room.sizes, _held_by_tenants(contexts)
        users = {context: context.users for context in contexts}
        blocking, dropped = set(in_the_way), []
        while True:
            tail_rank, most = self.memory.with_tail(sizes, room.tail_bytes)
            if most <= room.budget and not blocking:
                return tuple(dropped), tail_rank
            unused = [context for context, count in users.items() if not count and context is not keep]
            first = [context for context in unused if not blocking.isdisjoint(context.chain())]
            if not unused or (blocking and not first):
                return None
            dropped.append(
                min(first or unused, key=lambda context: (-held[context.owner.tenant], context.last_use))
            )
            sizes = _without(sizes, dropped[-1])
            held[dropped[-1].owner.tenant] -= _weighted_bytes(dropped[-1])
            blocking.discard(dropped[-1])
            del users[dropped[-1]]
            if dropped[-1].parent:
                users[dropped[-1].parent] -= 1


def _held_by_tenants(contexts: Iterable[CachedContext]) -> Counter[str]:
    """Bytes over shares."""
    held = Counter[str]()
    for context in contexts:
        held[context.owner.tenant] += _weighted_bytes(context)
    return held


def _weighted_bytes(context: CachedContext) -> float:
    return sum(context.bytes_per_rank) / context.owner.share


def _sum(sizes: Collection[list[int]]) -> list[int]:
    return [sum(of_rank) for of_rank in zip(*sizes, strict=True)]


def _without(sizes: list[int], context: CachedContext) -> list[int]:
    return [size - less for size, less in zip(sizes, context.bytes_per_rank, strict=True)]
