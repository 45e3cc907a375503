"""Contexts that requests share: what makes two of them the same, and where one stands."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from megatron_star.config import StarConfig
from megatron_star.engine.command import OpenedContext
from megatron_star.engine.owner import Owner
from megatron_star.planning.mask import Mask
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.scoring import Scoring

ContextKey = tuple[bytes, Mask]


TOKENS_OF_A_DIGEST = 256


def context_keys(
    token_ids: Sequence[int],
    edges: Sequence[int],
    mask: Mask,
    *,
    is_long: bool = False,
    salt: bytes = b"",
) -> dict[int, ContextKey]:
    """Of the contexts that end at these edges: equal where tokens, rotation, mask and salt are. Waves and
    owners change no result but, in 8 bits, the rounding.

    Args:
        mask: of the last one.
        is_long: see `EncodedContext`.
        salt: see `Owner`.
    """
    keys, tokens, hashed = {}, array("q", token_ids), hashlib.sha256(salt + (b"long" if is_long else b""))
    for start, end in pairwise((0, *edges)):
        hashed.update(tokens[start:end].tobytes())
        keys[end] = hashed.digest(), mask.prefix(end)
    return keys


def token_digests(token_ids: Sequence[int], salt: bytes = b"") -> tuple[bytes, ...]:
    """Of the first 256 tokens, of the first 512, and so on: the first ones are equal where tokens are.

    salt: see `Owner`.
    """
    digests, tokens, hashed = [], array("q", token_ids), hashlib.sha256(salt)
    for end in range(TOKENS_OF_A_DIGEST, len(tokens) + 1, TOKENS_OF_A_DIGEST):
        hashed.update(tokens[end - TOKENS_OF_A_DIGEST : end].tobytes())
        digests.append(hashed.digest()[:16])
    return tuple(digests)


@dataclass(eq=False)
class CachedContext:
    """A context that is encoded, being encoded, or waiting for it.

    `plan` is always that of `star` and `edges` on top of the parent's first `plan.start` tokens: it is what
    the ranks make of this context's `OpenedContext`, which carries these and not the plan.
    `users` are the requests that need it, the contexts that extend it or its first tokens, and the store
    while it is written there.
    `unwanted`: it, or what it extends, was deleted; it is dropped as soon as nothing uses it.
    `entry` names what of the context store it is read from, layer by layer, instead of being encoded.
    `digests` are those of `token_digests`.
    `scoring` says what its one user wants to know of its tokens.
    `owner` is whose it is, `priority` that of the most urgent request that waits for it.
    """

    id: int
    key: ContextKey
    token_ids: list[int]
    digests: tuple[bytes, ...]
    star: StarConfig
    edges: tuple[int, ...]
    plan: ContextPlan
    parent: Self | None
    bytes_per_rank: list[int]
    owner: Owner = Owner()
    priority: int = 0
    is_long: bool = False
    users: int = 0
    last_use: int = 0
    unwanted: bool = False
    opened: bool = False
    next_wave: int = 0
    entry: str = ""
    num_restored_layers: int = 0
    scoring: Scoring | None = None

    @property
    def encoded(self) -> bool:
        """All waves went through the model."""
        return self.opened and self.next_wave == len(self.plan.waves)

    @property
    def num_encoded_tokens(self) -> int:
        """So far, with what it extends."""
        if self.encoded:
            return self.plan.num_tokens
        waves = self.plan.waves[: self.next_wave]
        return self.plan.start + sum(segment.num_tokens for wave in waves for segment in wave)

    @property
    def base_plan(self) -> ContextPlan | None:
        """What its plan extends."""
        return self.parent.plan.prefix(self.plan.start) if self.parent else None

    @property
    def num_links(self) -> int:
        """Contexts in its chain."""
        return sum(1 for _ in self.chain())

    def opening(self) -> OpenedContext:
        """What the ranks are told of it."""
        start = self.plan.start
        parent = (self.parent.id, start) if self.parent else None
        tokens = self.token_ids[start:]
        return OpenedContext(self.id, tokens, self.star, self.edges, parent, self.is_long)

    def chain(self) -> Iterator[Self]:
        """This context, the one that it extends, and so on."""
        context: Self | None = self
        while context:
            yield context
            context = context.parent
