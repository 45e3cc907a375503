"""Who encodes which context tokens, and what those tokens attend to: integers only.

Star Attention is a block-sparse causal mask (arXiv 2411.17116, section 2.1). A `ContextPlan` cuts the context
into segments and says for each one who encodes it and which earlier ranges it attends to, besides itself.
This module knows no tensor, no process group and no Megatron.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

from megatron_star.config import StarConfig

WHOLE_BLOCK_TOLERANCE = 1.1
"""A block is kept on one rank while the slowest rank costs at most this much more than the best sharing."""


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
    either whole on one rank or spread over all of them in zigzag order, so that every rank gets early and
    late pieces and the causal work is even.

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

        `config.mode` is `star` or `exact`; `base` was built with the same mode and sizes.
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
        )

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


class Read(NamedTuple):
    """One source as this rank uses it: these of its wave's rows attend to it.

    `rows` are disjoint ranges of the packed rows; empty if the rank only takes part in the transfer.
    """

    source: Source
    rows: tuple[tuple[int, int], ...]
    crosses_ranks: bool


def wave_reads(wave: Wave, cp_rank: int) -> tuple[Read, ...]:
    """What this rank reads in a wave, in the order in which every rank goes through the transfers.

    Sources that stay on this rank and lie side by side are joined where the same rows attend to them.
    """
    rows_of: dict[Source, list[tuple[int, int]]] = {}
    crossing: set[Source] = set()
    offset = 0
    for segment in wave:
        mine = segment.owner == cp_rank
        for source in segment.sources:
            rows = rows_of.setdefault(source, [])
            if segment.owner != source.owner:
                crossing.add(source)
            if mine:
                first = offset + segment.recomputed
                _append_range(rows, first, first + segment.num_tokens)
        offset += (segment.recomputed + segment.num_tokens) if mine else 0
    reads: list[Read] = []
    for source in sorted(rows_of):
        read = Read(source, tuple(rows_of[source]), source in crossing)
        if reads and _joinable(reads[-1], read):
            read = Read(Source(reads[-1].source.start, source.end, cp_rank), read.rows, False)
            reads.pop()
        if read.rows or read.crosses_ranks:
            reads.append(read)
    return tuple(reads)


def _joinable(left: Read, right: Read) -> bool:
    return (
        not left.crosses_ranks
        and not right.crosses_ranks
        and left.source.owner == right.source.owner
        and left.source.end == right.source.start
        and left.rows == right.rows
    )


def _append_range(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Append [start, end), joined to the last range where it continues it."""
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))


def _even_edges(start: int, end: int, parts: int) -> list[int]:
    """Edges that cut [start, end) into `parts` ranges whose sizes differ by at most one."""
    return [start + (end - start) * i // parts for i in range(parts + 1)]


def _with_even_blocks(edges: tuple[int, ...], end: int, block_size: int) -> tuple[int, ...]:
    """Block edges continued to `end` by as few blocks of at most `block_size` as there can be, evenly."""
    num_blocks = -(-(end - edges[-1]) // block_size)
    return edges[:-1] + tuple(_even_edges(edges[-1], end, num_blocks)) if num_blocks else edges


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
        self.stored = list(base.stored) if base else []

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
        if any(_rank_tokens(wave, rank) > self.config.wave_tokens for rank in range(self.cp_size)):
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
        """The wave that spreads the fewest blocks, among those about as fast as the fastest."""
        edges = [start, *(edge for edge in self.block_edges if start < edge < end), end]
        blocks = [(left, right) for left, right in pairwise(edges) if left < right]
        in_rounds = len(blocks) // self.cp_size * self.cp_size
        candidates = dict.fromkeys((len(blocks), in_rounds, max(0, in_rounds - self.cp_size)))
        waves = [self._wave(blocks, num_whole) for num_whole in candidates]
        slowest = [_slowest_rank(wave, self.cp_size, self.costs) for wave in waves]
        bound = WHOLE_BLOCK_TOLERANCE * min(slowest)
        return next(wave for wave, cost in zip(waves, slowest, strict=True) if cost <= bound)

    def _wave(self, blocks: list[tuple[int, int]], num_whole: int) -> Wave:
        """The first `num_whole` blocks in runs of whole blocks, one run a rank; the others spread."""
        pieces: list[Source] = []
        for i, (start, end) in enumerate(blocks):
            if i < num_whole:
                pieces.append(Source(start, end, i * self.cp_size // num_whole))
            else:
                pieces += self._zigzag(start, end)
        known = self.stored + self._stored_by(pieces)
        return tuple(self._segment(piece, known) for piece in pieces)

    def _zigzag(self, start: int, end: int) -> list[Source]:
        """[start, end) in 2 * cp_size even pieces; rank r owns pieces r and 2 * cp_size - 1 - r."""
        last = 2 * self.cp_size - 1
        edges = _even_edges(start, end, last + 1)
        pieces: list[Source] = []
        for i, (left, right) in enumerate(pairwise(edges)):
            owner = min(i, last - i)
            if pieces and pieces[-1].owner == owner:
                pieces[-1] = Source(pieces[-1].start, right, owner)
            elif left < right:
                pieces.append(Source(left, right, owner))
        return pieces

    def _segment(self, piece: Source, known: list[Source]) -> Segment:
        block = bisect_right(self.block_edges, piece.start) - 1
        visible_from = self.block_edges[max(0, block - self.config.neighbor_blocks)]
        anchor_end = self.anchor_size if block else 0
        recomputed = anchor_end if self.config.anchor == "recompute" else 0
        anchor = slice(_first_from(known, recomputed), _first_from(known, anchor_end))
        near = slice(max(anchor.stop, _first_from(known, visible_from)), _first_from(known, piece.start))
        sources = (*known[anchor], *known[near])
        return Segment(piece.start, piece.end, piece.owner, sources, recomputed)

    def _stored_by(self, pieces: Wave | list[Source]) -> list[Source]:
        """The pieces as sources, cut where the anchor ends, so that sources never overlap."""
        sources = []
        for piece in pieces:
            cuts = sorted({piece.start, piece.end, min(max(self.anchor_size, piece.start), piece.end)})
            sources += [Source(left, right, piece.owner) for left, right in pairwise(cuts)]
        return sources


def _first_from(sources: list[Source], token: int) -> int:
    """Index of the first source that starts at `token` or later; sources are in the context's order."""
    return bisect_left(sources, token, key=lambda source: source.start)


def _rank_tokens(wave: Wave, rank: int) -> int:
    return sum(segment.num_tokens for segment in wave if segment.owner == rank)
