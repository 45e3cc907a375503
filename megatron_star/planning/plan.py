"""Who encodes which context tokens, and what those tokens attend to: integers only.

Star Attention is a block-sparse causal mask (arXiv 2411.17116, section 2.1). A `ContextPlan` cuts the context
into segments and says for each one who encodes it; its mask says which earlier ranges it attends to, besides
itself. This module knows no tensor, no process group and no Megatron.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Self

from megatron_star.config import StarConfig
from megatron_star.planning.mask import Mask, Range, mask_of
from megatron_star.planning.segment import Segment, Source, TokenCosts, Wave, slowest_rank
from megatron_star.planning.sizes import with_sizes
from megatron_star.planning.waves import WaveBuilder


@dataclass(frozen=True)
class ContextPlan:
    """How `num_tokens` of context are encoded by `cp_size` ranks, wave by wave.

    A wave is a range of the context, in order, which the ranks encode in one forward pass.

    A plan may extend another one, whose `num_tokens` it begins at (`start`): its waves encode the tokens from
    there on, in blocks of their own, and may attend to all that the other plan stored.

    Attributes:
        mask: what tokens see in the layers whose mask the user's options choose; of others, a `LayerMask`
            says it, whatever the plan.
        stored: of the whole context, who has which tokens' KV. What lies side by side on a rank is one, but
            not where this plan or one that it extends begins: each keeps its KV in its own storage.
    """

    start: int
    num_tokens: int
    cp_size: int
    mask: Mask
    waves: tuple[Wave, ...]
    stored: tuple[Source, ...]

    @classmethod
    def build(
        cls,
        num_tokens: int,
        cp_size: int,
        config: StarConfig,
        costs: TokenCosts | None = None,
        base: Self | None = None,
        mask: Mask | None = None,
    ) -> Self:
        """The plan for a context of `num_tokens` >= 0, of which `base` has the beginning.

        `config.mode` is not `auto`. Sizes that it leaves open are those of `with_sizes`.

        Args:
            mask: of the whole context, whatever `base` is. Without it, what follows `base` is a turn: it is
                cut into blocks on its own. The first tokens are encoded alike under it and under that of
                `base` (`num_shared_tokens`); waves may differ.
        """
        assert num_tokens >= 0 and cp_size >= 1
        config = with_sizes(config, num_tokens)
        start = base.num_tokens if base else 0
        mask = mask or mask_of(config, num_tokens, base.mask if base else None)
        assert mask.num_tokens == num_tokens >= start
        waves = tuple(WaveBuilder(start, mask, cp_size, config, costs or TokenCosts()).waves())
        stored = _joined(Source(s.start, s.end, s.owner) for wave in waves for s in wave)
        return cls(
            start=start,
            num_tokens=num_tokens,
            cp_size=cp_size,
            mask=mask,
            waves=waves,
            stored=(*(base.stored if base else ()), *stored),
        )

    @classmethod
    def chain(
        cls,
        edges: Iterable[int],
        cp_size: int,
        config: StarConfig,
        costs: TokenCosts | None = None,
        base: Self | None = None,
    ) -> tuple[Self, ...]:
        """The plans of contexts that end at these rising edges, each extending the one before."""
        plans: list[Self] = []
        for num_tokens in edges:
            plans.append(cls.build(num_tokens, cp_size, config, costs, plans[-1] if plans else base))
        return tuple(plans)

    def prefix(self, num_tokens: int) -> Self:
        """What it says of the first `num_tokens`: of all, or of so many that it encodes some of them."""
        if num_tokens == self.num_tokens:
            return self
        assert self.start < num_tokens < self.num_tokens
        waves = (tuple(s.prefix(num_tokens) for s in wave if s.start < num_tokens) for wave in self.waves)
        return replace(
            self,
            num_tokens=num_tokens,
            mask=self.mask.prefix(num_tokens),
            waves=tuple(wave for wave in waves if wave),
            stored=tuple(self.owners_of(Range(0, num_tokens))),
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the mask; 0 for an empty context."""
        return self.mask.num_blocks

    def segments(self) -> Iterator[Segment]:
        """All segments in the order of the context."""
        for wave in self.waves:
            yield from wave

    def owned(self, cp_rank: int) -> tuple[Segment, ...]:
        """The segments that this rank stores, in the order in which it stores them."""
        return tuple(segment for segment in self.segments() if segment.owner == cp_rank)

    @cached_property
    def owned_tokens(self) -> tuple[int, ...]:
        """For each rank, of how many context tokens it stores the KV."""
        owned = [0] * self.cp_size
        for segment in self.segments():
            owned[segment.owner] += segment.num_tokens
        return tuple(owned)

    def num_owned_tokens(self, cp_rank: int) -> int:
        """Context tokens whose KV this rank stores."""
        return self.owned_tokens[cp_rank]

    def owners_of(self, tokens: Range) -> Iterator[Source]:
        """Who has which part of a range, in the order of the context."""
        for index in range(bisect_right(self.stored, tokens.start, key=attrgetter("end")), len(self.stored)):
            start, end, owner = self.stored[index]
            if start >= tokens.end:
                return
            yield Source(max(start, tokens.start), min(end, tokens.end), owner)

    def cost(self, costs: TokenCosts) -> float:
        """The time of the encoding in units of `costs`: the slowest rank of each wave, added up."""
        return sum(self.wave_cost(index, costs) for index in range(len(self.waves)))

    def wave_cost(self, index: int, costs: TokenCosts) -> float:
        """The slowest rank of one wave."""
        return slowest_rank(self.waves[index], self.mask, costs)

    def largest_wave_cost(self, costs: TokenCosts) -> float:
        """The slowest rank of the slowest wave; 0 for an empty context."""
        return max((self.wave_cost(index, costs) for index in range(len(self.waves))), default=0.0)


def _joined(pieces: Iterable[Source]) -> list[Source]:
    """Pieces that follow each other; those of one rank side by side are one."""
    joined: list[Source] = []
    for piece in pieces:
        if joined and (joined[-1].end, joined[-1].owner) == (piece.start, piece.owner):
            joined[-1] = Source(joined[-1].start, piece.end, piece.owner)
        else:
            joined.append(piece)
    return joined
