"""What the scheduler keeps: jobs, and the contexts that they share. No tensor and no process group."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest
from megatron_star.planning.mask import Mask
from megatron_star.planning.plan import ContextPlan

ContextKey = tuple[bytes, Mask]


def context_key(token_ids: list[int], plan: ContextPlan) -> ContextKey:
    """Equal for contexts with the same tokens and the same mask; waves and owners do not change a result."""
    digest = hashlib.sha256(array("q", token_ids).tobytes()).digest()
    return digest, plan.mask


@dataclass(eq=False)
class CachedContext:
    """A context that is encoded, being encoded, or waiting for it.

    `plan` is always that of `star` on top of the parent's plan: it is what the ranks make of this context's
    `Command.open_context`, which carries `star` and not the plan.
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

    def chain(self) -> Iterator[Self]:
        """This context, the one that it extends, and so on."""
        context: Self | None = self
        while context:
            yield context
            context = context.parent


@dataclass(eq=False)
class Job:
    """A request on its way through the scheduler.

    Attributes:
        plans: of its context, and before it of each earlier turn's context, which the next one extends: as
            they are if no context of another job is used. They never change, and neither does `star`.
        pending: tokens that are to be fed next: the query, then each generated token.
        opened: its sequence exists on the ranks.
        is_answering: its query went through the model, and what is pending is a generated token.
    """

    id: int
    request: StarRequest
    mode: str
    star: StarConfig
    plans: tuple[ContextPlan, ...]
    keys: tuple[ContextKey, ...]
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
