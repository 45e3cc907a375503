"""What memory KV takes, of a context and of a sequence's tail: integers, known to the scheduler before
anything is allocated."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range
from megatron_star.planning.plan import ContextPlan

TAIL_CHUNK_TOKENS = 256


def tail_capacity(num_tokens: int) -> int:
    """Tokens that a tail of `num_tokens` takes memory for."""
    return -(-num_tokens // TAIL_CHUNK_TOKENS) * TAIL_CHUNK_TOKENS


def recent_tail_capacity(num_kept: int) -> int:
    """Tokens that a layer with a mask of its own takes memory for, when it keeps so many of a tail.

    It has room for about as many again, at most a chunk: so what is kept is moved seldom.
    """
    return tail_capacity(num_kept + min(num_kept, TAIL_CHUNK_TOKENS) + 1)


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

    def num_bytes(self, num_tokens: Callable[[LayerMask | None], int]) -> int:
        """Of so many tokens in each layer of a mask."""
        counts = self.num_layers.items()
        return sum(count * num_tokens(mask) for mask, count in counts) * self.bytes_per_token

    def of_context(self, plan: ContextPlan, *, spare: bool = True) -> list[int]:
        """What a plan encodes, on each CP rank, while its waves are encoded and afterwards.

        Args:
            spare: with the capacity that is left for a tail.
        """
        tokens = {mask: _most_held(plan, mask) for mask in self.num_layers}
        if spare and None in tokens:
            tokens[None] = [n + spare_capacity(n) for n in tokens[None]]
        return [self.num_bytes(lambda mask, rank=rank: tokens[mask][rank]) for rank in range(plan.cp_size)]

    def of_tail(self, num_tokens: int) -> int:
        """A tail that may become so long, on its rank."""
        return self.num_bytes(
            lambda mask: (
                recent_tail_capacity(mask.most_kept(num_tokens)) if mask else tail_capacity(num_tokens)
            )
        )

    def of_tokens(self, num_tokens: int, num_ranks: int = 1) -> int:
        """At most, of consecutive tokens that share their KV over so many ranks about evenly.

        What a layer with a mask of its own keeps may all be on one of them.
        """
        return self.num_bytes(
            lambda mask: mask.most_kept(num_tokens) if mask else -(-num_tokens // num_ranks)
        )


def _most_held(plan: ContextPlan, mask: LayerMask | None) -> list[int]:
    """Tokens of which each rank holds the KV, after the wave with which it holds most."""
    if mask is None:
        return list(plan.owned_tokens)
    waves = [recent_tokens(plan, mask, wave[-1].end) for wave in plan.waves]
    return [max((held[rank] for held in waves), default=0) for rank in range(plan.cp_size)]
