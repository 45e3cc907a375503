"""Who encodes which context tokens, and what those tokens attend to: integers only.

Star Attention is a block-sparse causal mask (arXiv 2411.17116, section 2.1). A `ContextPlan` cuts the context
into segments and says for each one who encodes it and which earlier ranges it attends to, besides itself.
This module knows no tensor, no process group and no Megatron.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple, Self

from megatron_star.config import StarConfig

WHOLE_BLOCK_TOLERANCE = 1.1
"""The fewest pieces are taken with which the slowest rank costs at most this much more than with the best."""

MOST_PIECES = 4096
"""Of one wave: more of them are not worth their small broadcasts."""


class TokenCosts(NamedTuple):
    """What encoding costs, in any one unit: of each token, and of each visible (query, key) pair."""

    linear_per_token: float = 1.0
    attention_per_pair: float = 0.0


class Source(NamedTuple):
    """Context tokens [start, end), whose KV rank `owner` stores; always within one of its segments."""

    start: int
    end: int
    owner: int


class Segment(NamedTuple):
    """Context tokens [start, end), encoded by rank `owner` while seeing `sources` and, causally, itself.

    `recomputed` anchor tokens are encoded once more in front of it and forgotten (anchor="recompute").
    """

    start: int
    end: int
    owner: int
    sources: tuple[Source, ...] = ()
    recomputed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is kept."""
        return self.end - self.start

    def cost(self, costs: TokenCosts) -> float:
        """What its owner computes for it."""
        rows = self.recomputed + self.num_tokens
        pairs = rows * (rows + 1) / 2 + self.num_tokens * sum(s.end - s.start for s in self.sources)
        return costs.linear_per_token * rows + costs.attention_per_pair * pairs


Wave = tuple[Segment, ...]


@dataclass(frozen=True)
class ContextPlan:
    """How `num_tokens` of context are encoded by `cp_size` ranks, wave by wave.

    A wave is a range of the context, in order, which the ranks encode in one forward pass. In it, a block is
    either whole on one rank or spread over a team of ranks in zigzag order, so that each gets early and late
    pieces and the causal work is even. Small teams make few and large pieces.

    A plan may extend another one, whose `num_tokens` it begins at (`start`): its waves encode the tokens from
    there on, in blocks of their own, with the other plan's anchor and segments among their sources.
    """

    start: int
    num_tokens: int
    cp_size: int
    anchor_size: int
    block_edges: tuple[int, ...]
    waves: tuple[Wave, ...]
    stored: tuple[Source, ...]
    seams: tuple[int, ...] = ()
    """Where this plan and those that it extends begin, but for 0: each keeps its KV in its own storage."""

    @classmethod
    def build(
        cls,
        num_tokens: int,
        cp_size: int,
        config: StarConfig,
        costs: TokenCosts | None = None,
        base: Self | None = None,
    ) -> Self:
        """The plan for a context of `num_tokens` >= 0, of which `base` has the beginning.

        `config.mode` is `star` or `exact`; `base` was built with the same mode, sizes and neighbors, or is
        one block, whatever else it was built with. Waves may differ.
        """
        planner = _Planner(num_tokens, cp_size, config, costs or TokenCosts(), base)
        waves = tuple(planner.waves())
        return cls(
            start=planner.start,
            num_tokens=num_tokens,
            cp_size=cp_size,
            anchor_size=planner.anchor_size,
            block_edges=planner.block_edges,
            waves=waves,
            stored=tuple(planner.stored),
            seams=(*base.seams, planner.start) if base else (),
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

    @property
    def num_blocks(self) -> int:
        """Blocks of the mask; 0 for an empty context."""
        return len(self.block_edges) - 1

    def segments(self) -> Iterator[Segment]:
        """All segments in the order of the context."""
        for wave in self.waves:
            yield from wave

    def owned(self, cp_rank: int) -> tuple[Segment, ...]:
        """The segments that this rank stores, in the order in which it stores them."""
        return tuple(segment for segment in self.segments() if segment.owner == cp_rank)

    def num_owned_tokens(self, cp_rank: int) -> int:
        """Context tokens whose KV this rank stores."""
        return sum(segment.num_tokens for segment in self.owned(cp_rank))

    def cost(self, costs: TokenCosts) -> float:
        """The time of the encoding in units of `costs`: the slowest rank of each wave, added up."""
        return sum(self.wave_cost(index, costs) for index in range(len(self.waves)))

    def wave_cost(self, index: int, costs: TokenCosts) -> float:
        """The slowest rank of one wave."""
        return _slowest_rank(self.waves[index], self.cp_size, costs)

    def largest_wave_cost(self, costs: TokenCosts) -> float:
        """The slowest rank of the slowest wave; 0 for an empty context."""
        return max((self.wave_cost(index, costs) for index in range(len(self.waves))), default=0.0)


def _even_edges(start: int, end: int, parts: int) -> list[int]:
    """Edges that cut [start, end) into `parts` ranges whose sizes differ by at most one."""
    return [start + (end - start) * i // parts for i in range(parts + 1)]


def _with_even_blocks(edges: tuple[int, ...], end: int, block_size: int) -> tuple[int, ...]:
    """Block edges continued to `end` by as few blocks of at most `block_size` as there can be, evenly."""
    num_blocks = -(-(end - edges[-1]) // block_size)
    return edges[:-1] + tuple(_even_edges(edges[-1], end, num_blocks)) if num_blocks else edges


def _zigzag(start: int, end: int, ranks: range) -> list[Source]:
    """[start, end) in 2 * n even pieces; the i-th of n ranks owns pieces i and 2 * n - 1 - i."""
    last = 2 * len(ranks) - 1
    pieces: list[Source] = []
    for i, (left, right) in enumerate(pairwise(_even_edges(start, end, last + 1))):
        owner = ranks[min(i, last - i)]
        if pieces and pieces[-1].owner == owner:
            pieces[-1] = Source(pieces[-1].start, right, owner)
        elif left < right:
            pieces.append(Source(left, right, owner))
    return pieces


def _slowest_rank(wave: Wave, cp_size: int, costs: TokenCosts) -> float:
    totals = [0.0] * cp_size
    for segment in wave:
        totals[segment.owner] += segment.cost(costs)
    return max(totals)


class _Planner:
    """Builds the waves of one plan from front to back, so that sources always exist already."""

    def __init__(
        self, num_tokens: int, cp_size: int, config: StarConfig, costs: TokenCosts, base: ContextPlan | None
    ) -> None:
        assert num_tokens >= 0 and cp_size >= 1 and config.mode in ("star", "exact")
        self.num_tokens, self.cp_size, self.config, self.costs = num_tokens, cp_size, config, costs
        self.start = base.num_tokens if base else 0
        exact = config.mode == "exact"
        block_size = max(1, num_tokens) if exact else config.block_size
        first_edges = base.block_edges if base and not exact else (0,)
        self.block_edges = _with_even_blocks(first_edges, num_tokens, block_size)
        anchor_size = block_size if exact or config.anchor_size is None else config.anchor_size
        self.anchor_size = min(anchor_size, self.block_edges[1]) if num_tokens else 0
        # A base of one block may have been built with another anchor: for its own mask that is the same.
        self.stored = self._stored_by(base.stored) if base else []

    def waves(self) -> Iterator[Wave]:
        """The waves, once: `stored` grows with them."""
        for first, last in pairwise(self._wave_edges()):
            yield from self._waves_within(first, last)

    def _wave_edges(self) -> list[int]:
        """Block edges between waves, a multiple of `cp_size` blocks apart where blocks fit a wave."""
        edges = [self.start, *(edge for edge in self.block_edges if edge > self.start)]
        largest = max((end - start for start, end in pairwise(edges)), default=1)
        per_rank = self.config.wave_tokens // largest
        step = per_rank * self.cp_size or max(1, self.config.wave_tokens * self.cp_size // largest)
        return [edges[i] for i in range(0, len(edges) - 1, step)] + [self.num_tokens]

    def _waves_within(self, start: int, end: int) -> Iterator[Wave]:
        """[start, end) as one wave, or halved until no rank gets more than `wave_tokens`."""
        wave = self._balanced_wave(start, end)
        tokens = Counter[int]()
        for segment in wave:
            tokens[segment.owner] += segment.num_tokens
        if any(count > self.config.wave_tokens for count in tokens.values()):
            middle = self._middle(start, end)
            yield from self._waves_within(start, middle)
            yield from self._waves_within(middle, end)
        elif wave:
            self.stored += self._stored_by(wave)
            yield wave

    def _middle(self, start: int, end: int) -> int:
        """Where to halve a wave: the block edge nearest its middle, or the middle of a lone block."""
        middle = (start + end) // 2
        edges = [edge for edge in self.block_edges if start < edge < end]
        return min(edges, key=lambda edge: abs(edge - middle)) if edges else middle

    def _balanced_wave(self, start: int, end: int) -> Wave:
        """The wave of the fewest pieces, among those about as fast as the fastest that was looked at.

        Teams share the tokens evenly, and so the KV; or else the work, of which the first block has less.
        The search ends with one about as fast as an even share of the work. `MOST_PIECES` bounds it.
        """
        edges = [start, *(edge for edge in self.block_edges if start < edge < end), end]
        blocks = [(left, right) for left, right in pairwise(edges) if left < right]
        found = [self._wave(self._runs(blocks))]
        block_costs = [segment.cost(self.costs) for segment in found[0]]
        slowest = [_slowest_rank(found[0], self.cp_size, self.costs)]
        even = [1.0] * len(blocks)
        ways = product(self._ways_to_spread(len(blocks)), (even, block_costs))
        for (num_whole, num_teams), weights in ways:
            if slowest[-1] <= WHOLE_BLOCK_TOLERANCE * sum(block_costs) / self.cp_size:
                break
            teams = self._teams(blocks[num_whole:], weights[num_whole:], num_teams)
            found.append(self._wave(self._runs(blocks[:num_whole]) + teams))
            slowest.append(_slowest_rank(found[-1], self.cp_size, self.costs))
        bound = WHOLE_BLOCK_TOLERANCE * min(slowest)
        return next(wave for wave, cost in zip(found, slowest, strict=True) if cost <= bound)

    def _ways_to_spread(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """Numbers of whole blocks, and of teams that share the others; those of fewer pieces first."""
        in_rounds = num_blocks // self.cp_size * self.cp_size
        for num_whole in dict.fromkeys((in_rounds, max(0, in_rounds - self.cp_size))):
            num_spread = num_blocks - num_whole
            num_teams = min(num_spread, self.cp_size)
            while num_teams and 2 * num_spread * self.cp_size <= MOST_PIECES * num_teams:
                yield num_whole, num_teams
                num_teams //= 2

    def _runs(self, blocks: list[tuple[int, int]]) -> list[Source]:
        """Whole blocks, one run of neighbours a rank."""
        return [Source(*block, i * self.cp_size // len(blocks)) for i, block in enumerate(blocks)]

    def _teams(self, blocks: list[tuple[int, int]], weights: list[float], num_teams: int) -> list[Source]:
        """Runs of neighbouring blocks, each spread over a team of ranks: their share of the weight."""
        pieces: list[Source] = []
        first_rank, weight = 0, 0.0
        for team, (left, right) in enumerate(pairwise(_even_edges(0, len(blocks), num_teams)), start=1):
            weight += sum(weights[left:right])
            share = round(self.cp_size * weight / sum(weights))
            last_rank = min(max(share, first_rank + 1), self.cp_size - num_teams + team)
            for block in blocks[left:right]:
                pieces += _zigzag(*block, range(first_rank, last_rank))
            first_rank = last_rank
        return pieces

    def _wave(self, pieces: list[Source]) -> Wave:
        known = self.stored + self._stored_by(pieces)
        return tuple(self._segment(piece, known) for piece in pieces)

    def _segment(self, piece: Source, known: list[Source]) -> Segment:
        block = bisect_right(self.block_edges, piece.start) - 1
        visible_from = self.block_edges[max(0, block - self.config.neighbor_blocks)]
        anchor_end = self.anchor_size if block else 0
        recomputed = anchor_end if self.config.anchor == "recompute" else 0
        anchor = slice(_first_from(known, recomputed), _first_from(known, anchor_end))
        near = slice(max(anchor.stop, _first_from(known, visible_from)), _first_from(known, piece.start))
        sources = (*known[anchor], *known[near])
        return Segment(piece.start, piece.end, piece.owner, sources, recomputed)

    def _stored_by(self, pieces: Iterable[Segment | Source]) -> list[Source]:
        """The pieces as sources, cut where the anchor ends, so that sources never overlap."""
        sources = []
        for piece in pieces:
            cuts = sorted({piece.start, piece.end, min(max(self.anchor_size, piece.start), piece.end)})
            sources += [Source(left, right, piece.owner) for left, right in pairwise(cuts)]
        return sources


def _first_from(sources: list[Source], token: int) -> int:
    """Index of the first source that starts at `token` or later; sources are in the context's order."""
    return bisect_left(sources, token, key=lambda source: source.start)
