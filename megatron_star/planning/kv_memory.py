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
        bytes_per_token: of one layer.
    """

    masks: tuple[LayerMask | None, ...]
    bytes_per_token: int

    @cached_property
    def num_layers(self) -> Counter[LayerMask | None]:
        """Of each mask."""
        return Counter(self.masks)

    @property
    def num_passing(self) -> int:
        """Layers that pass keys: those whose mask the user's options choose, but the last of the model."""
        return self.masks[:-1].count(None)

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
        full = [n + spare * spare_capacity(n) for n in plan.owned_tokens]
        besides = list(self._besides(plan, named))
        most = [max((held[rank] for held in besides), default=0) for rank in range(plan.cp_size)]
        of_a_layer = self.bytes_per_token
        return [of_a_layer * (self.num_layers[None] * f + m) for f, m in zip(full, most, strict=True)]

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
            tokens = sum(_context_tokens(plan, mask) for plan in plans) + _tail_tokens(num_tail_tokens, mask)
            kinds[mask.name if mask else "full"] = count * tokens * self.bytes_per_token
        named = [block for plan in plans for wave in plan.waves for block in named_blocks(plan, wave)]
        if num_copies := self.num_passing * sum(block.num_copies for block in named):
            kinds["passed keys"] = num_copies * self.bytes_per_token
        return kinds

    def of_tokens(self, num_tokens: int) -> int:
        """What is kept of consecutive tokens, at most, without room for more."""
        return self.num_bytes(lambda mask: mask.most_kept(num_tokens) if mask else num_tokens)

    def of_all(self, num_tokens: int) -> int:
        """Where layers with a mask of their own keep all tokens, too."""
        return self.num_bytes(lambda mask: num_tokens)


def _tail_tokens(num_tokens: int, mask: LayerMask | None) -> int:
    """Tokens that a tail takes memory for in a layer."""
    return recent_tail_capacity(num_tokens, mask) if mask else tail_capacity(num_tokens)


def _context_tokens(plan: ContextPlan, mask: LayerMask | None) -> int:
    """Tokens that all ranks take memory for in a layer, once a plan is run."""
    if mask:
        return recent_tokens(plan, mask, plan.num_tokens).total()
    return sum(n + spare_capacity(n) for n in plan.owned_tokens)
