"""What memory KV takes, of a context and of a sequence's tail: integers, known to the scheduler before
anything is allocated."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range
from megatron_star.planning.passing import named_blocks
from megatron_star.planning.plan import ContextPlan

TAIL_CHUNK_TOKENS = 256
SCALE_BYTES = 4
"""Of a token and KV head that are kept in 8 bits, of its key and of its value: a float32."""

MOST_PROPOSED_TOKENS = 16
"""Tokens that are fed in one step because they are guessed, at most: a tail can forget so many."""


def tail_capacity(num_tokens: int) -> int:
    """Tokens that a tail of `num_tokens` takes memory for."""
    return -(-num_tokens // TAIL_CHUNK_TOKENS) * TAIL_CHUNK_TOKENS


def recent_tail_capacity(num_tokens: int, mask: LayerMask) -> int:
    """The same in a layer with a mask of its own, which keeps only what later tokens can see.

    As long as that is all, the tail grows as any other. Then there is room for a chunk more, so that what is
    kept is moved seldom.
    """
    most_kept = mask.size - 1 + MOST_PROPOSED_TOKENS
    if num_tokens <= most_kept:
        return tail_capacity(num_tokens)
    return tail_capacity(most_kept + TAIL_CHUNK_TOKENS)


def spare_capacity(num_tokens: int) -> int:
    """Tokens that a rank takes memory for after the `num_tokens` that it holds of a context."""
    return min(2 * TAIL_CHUNK_TOKENS, num_tokens // 8)


def recent_tokens(plan: ContextPlan, mask: LayerMask, end: int) -> Counter[int]:
    """Tokens that each rank keeps of what a plan encodes, in a layer with a mask of its own.

    Args:
        end: of the last wave that was encoded: of the tokens before it, later ones see only some.
    """
    held: Counter[int] = Counter()
    for source in plan.owners_of(Range(max(plan.start, mask.kept_from(end)), end)):
        held[source.owner] += source.end - source.start
    return held


@dataclass(frozen=True)
class KvLayers:
    """The layers of a model as their KV takes memory, of one TP rank.

    Attributes:
        masks: of each layer; None where the user's options choose it.
        bytes_per_token: of one layer, as it is computed.
        stored_bytes_per_token: of an encoded context, in one layer without a mask of its own, where that is
            in 8 bits; then there is no capacity for a tail after it. 0: as it is computed.
    """

    masks: tuple[LayerMask | None, ...]
    bytes_per_token: int
    stored_bytes_per_token: int = 0

    @cached_property
    def num_layers(self) -> Counter[LayerMask | None]:
        """Of each mask."""
        return Counter(self.masks)

    @property
    def num_passing(self) -> int:
        """Layers that pass keys: those whose mask the user's options choose, but the last of the model."""
        return self.masks[:-1].count(None)

    def of_stored(self, num_tokens: int, *, spare: bool = True) -> int:
        """Consecutive tokens of a context on one rank, in one layer without a mask of its own.

        Args:
            spare: with the capacity that is left for a tail.
        """
        if self.stored_bytes_per_token:
            return num_tokens * self.stored_bytes_per_token
        return (num_tokens + spare * spare_capacity(num_tokens)) * self.bytes_per_token

    @property
    def context_bytes_per_token(self) -> int:
        """Of a context, in all layers while no mask of a layer hides it."""
        return sum(
            count * (self.bytes_per_token if mask else self.of_stored(1, spare=False))
            for mask, count in self.num_layers.items()
        )

    def num_bytes(self, num_tokens: Callable[[LayerMask | None], int]) -> int:
        """Of so many tokens in each layer of a mask."""
        counts = self.num_layers.items()
        return sum(count * num_tokens(mask) for mask, count in counts) * self.bytes_per_token

    def of_context(self, plan: ContextPlan, *, spare: bool = True, named: bool = True) -> list[int]:
        """What a plan encodes, on each CP rank, while its waves are encoded and afterwards.

        Args:
            spare: with the capacity that is left for a tail.
            named: with the copies of named keys, which no query reads.
        """
        full = [self.of_stored(n, spare=spare) for n in plan.owned_tokens]
        besides = list(self._besides(plan, named))
        most = [max((held[rank] for held in besides), default=0) for rank in range(plan.cp_size)]
        return [self.num_layers[None] * f + self.bytes_per_token * m for f, m in zip(full, most, strict=True)]

    def _besides(self, plan: ContextPlan, named: bool) -> Iterator[Counter[int]]:
        """What ranks hold after each wave besides the KV of full layers: tokens of all layers together."""
        copies: Counter[int] = Counter()
        for wave in plan.waves:
            for block in named_blocks(plan, wave) if named else ():
                copies[block.owner] += self.num_passing * block.num_copies
            yield self._recent_tokens(plan, wave[-1].end) + copies

    def _recent_tokens(self, plan: ContextPlan, end: int) -> Counter[int]:
        """`recent_tokens` of all layers with a mask of their own together."""
        held: Counter[int] = Counter()
        for mask, count in self.num_layers.items():
            if mask:
                held.update({rank: count * n for rank, n in recent_tokens(plan, mask, end).items()})
        return held

    def of_tail(self, num_tokens: int) -> int:
        """A tail that may become so long, on its rank."""
        return self.num_bytes(lambda mask: _tail_tokens(num_tokens, mask))

    def by_kind(self, plans: Collection[ContextPlan], num_tail_tokens: int) -> dict[str, int]:
        """An encoded context and a tail, on all CP ranks together, by kind of layer: `full`, `window 1024`;
        and the copies of `passed keys` beside those of the full layers.

        Args:
            plans: of the context, and of those that it extends.
        """
        kinds = {}
        for mask, count in self.num_layers.items():
            of_context = sum(self._of_context_layer(plan, mask) for plan in plans)
            of_tail = _tail_tokens(num_tail_tokens, mask) * self.bytes_per_token
            kinds[mask.name if mask else "full"] = count * (of_context + of_tail)
        named = [block for plan in plans for wave in plan.waves for block in named_blocks(plan, wave)]
        if num_copies := self.num_passing * sum(block.num_copies for block in named):
            kinds["passed keys"] = num_copies * self.bytes_per_token
        return kinds

    def _of_context_layer(self, plan: ContextPlan, mask: LayerMask | None) -> int:
        """What all ranks keep in a layer, once a plan is run."""
        if mask:
            return recent_tokens(plan, mask, plan.num_tokens).total() * self.bytes_per_token
        return sum(self.of_stored(n) for n in plan.owned_tokens)

    def of_tokens(self, num_tokens: int) -> int:
        """What is kept of consecutive tokens, at most, without room for more."""
        return self.num_bytes(lambda mask: mask.most_kept(num_tokens) if mask else num_tokens)

    def of_all(self, num_tokens: int) -> int:
        """Where layers with a mask of their own keep all tokens, too."""
        return num_tokens * self.context_bytes_per_token


def _tail_tokens(num_tokens: int, mask: LayerMask | None) -> int:
    """Tokens that a tail takes memory for in a layer."""
    return recent_tail_capacity(num_tokens, mask) if mask else tail_capacity(num_tokens)
