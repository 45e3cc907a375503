"""Contexts that requests share: what makes two of them the same, and where one stands."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from megatron_star.config import StarConfig
from megatron_star.planning.mask import Mask
from megatron_star.planning.plan import ContextPlan

ContextKey = tuple[bytes, Mask]


def context_keys(
    token_ids: Sequence[int], plans: Sequence[ContextPlan], is_long: bool = False
) -> tuple[ContextKey, ...]:
    """Of each plan's context: equal where tokens, rotation and mask are. Waves and owners change no result.

    is_long: see `EncodedContext`.
    """
    keys, tokens, hashed = [], array("q", token_ids), hashlib.sha256(b"long" if is_long else b"")
    start = 0
    for plan in plans:
        hashed.update(tokens[start : plan.num_tokens].tobytes())
        start = plan.num_tokens
        keys.append((hashed.digest(), plan.mask))
    return tuple(keys)


@dataclass(eq=False)
class CachedContext:
    """A context that is encoded, being encoded, or waiting for it.

    `plan` is always that of `star` on top of the parent's plan: it is what the ranks make of this context's
    `Command.open_context`, which carries `star` and not the plan.
    `users` are the requests that need it, the contexts that extend it, and the store while it writes it.
    `entry` names what of the context store it is read from, layer by layer, instead of being encoded.
    """

    id: int
    key: ContextKey
    token_ids: list[int]
    star: StarConfig
    plan: ContextPlan
    parent: Self | None
    bytes_per_rank: list[int]
    is_long: bool = False
    users: int = 0
    last_use: int = 0
    opened: bool = False
    next_wave: int = 0
    entry: str = ""
    num_restored_layers: int = 0

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
