"""The pieces of a plan: segments, where their KV is, and what encoding them costs."""

from typing import NamedTuple, Self

from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Mask, Range, joined_ranges


class TokenCosts(NamedTuple):
    """What encoding costs, in any one unit: of each token, and of each visible (query, key) pair.

    Attributes:
        attention_per_pair: of all layers together whose mask the user's options choose.
        attention_of_masks: the same for each mask that layers have of their own.
    """

    linear_per_token: float = 1.0
    attention_per_pair: float = 0.0
    attention_of_masks: tuple[tuple[LayerMask, float], ...] = ()

    def scaled(self, linear: float, attention: float) -> Self:
        """In another unit: both kinds of work times their factor."""
        return type(self)(
            self.linear_per_token * linear,
            self.attention_per_pair * attention,
            tuple((mask, per_pair * attention) for mask, per_pair in self.attention_of_masks),
        )


class Source(NamedTuple):
    """Context tokens [start, end), whose KV rank `owner` stores in one piece."""

    start: int
    end: int
    owner: int


class Segment(NamedTuple):
    """Context tokens [start, end) of one block, encoded by rank `owner`.

    `recomputed` anchor tokens are encoded once more in front of it and forgotten (anchor="recompute").
    """

    start: int
    end: int
    owner: int
    recomputed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is kept."""
        return self.end - self.start

    @property
    def num_rows(self) -> int:
        """Tokens that its owner encodes for it."""
        return self.recomputed + self.num_tokens

    def prefix(self, num_tokens: int) -> Self:
        """What of it is in the first so many tokens of the context: some are."""
        return self._replace(end=min(self.end, num_tokens))

    def sources(self, mask: Mask) -> tuple[Range, ...]:
        """What its tokens attend to under a mask, besides what is encoded with them."""
        seen = mask.sources(self.start, self.end)
        return joined_ranges((max(start, self.recomputed), end) for start, end in seen)

    def cost(self, mask: Mask, costs: TokenCosts) -> float:
        """What its owner computes for it."""
        num_seen = sum(end - start for start, end in self.sources(mask)) + mask.num_passed(self.start)
        pairs = self.num_rows * (self.num_rows + 1) / 2 + self.num_tokens * num_seen
        of_masks = sum(per_pair * self.pairs(own) for own, per_pair in costs.attention_of_masks)
        return costs.linear_per_token * self.num_rows + costs.attention_per_pair * pairs + of_masks

    def pairs(self, mask: LayerMask) -> int:
        """Visible (query, key) pairs of all its rows in a layer with a mask of its own."""
        return mask.pairs(0, self.recomputed) + mask.pairs(self.start, self.end)


Wave = tuple[Segment, ...]


def cost_by_rank(wave: Wave, mask: Mask, costs: TokenCosts) -> dict[int, float]:
    """What each rank computes in a wave; ranks without segments are not there."""
    totals: dict[int, float] = {}
    for segment in wave:
        totals[segment.owner] = totals.get(segment.owner, 0.0) + segment.cost(mask, costs)
    return totals


def slowest_rank(wave: Wave, mask: Mask, costs: TokenCosts) -> float:
    """What the rank with most to compute in a wave has to; 0 for a wave of nothing."""
    return max(cost_by_rank(wave, mask, costs).values(), default=0.0)
