"""Who encodes what in which forward pass: waves, each shared evenly by the ranks.

In a wave, a block is either whole on one rank or spread over a team of ranks in zigzag order, so that each
gets early and late pieces and the causal work is even. Small teams make few and large pieces.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product

from megatron_star.config import StarConfig
from megatron_star.planning.mask import Mask, Range, even_edges
from megatron_star.planning.segment import Segment, Source, TokenCosts, Wave, slowest_rank

WHOLE_BLOCK_TOLERANCE = 1.1
"""The fewest pieces are taken with which the slowest rank costs at most this much more than with the best."""

MOST_PIECES = 4096
"""Of one wave, unless two for each rank are more: further ones are not worth their small broadcasts."""


class WaveBuilder:
    """Cuts [start, end of the mask) into waves of at most `config.wave_tokens` on each rank."""

    def __init__(self, start: int, mask: Mask, cp_size: int, config: StarConfig, costs: TokenCosts) -> None:
        self.start, self.mask, self.cp_size, self.config, self.costs = start, mask, cp_size, config, costs

    def waves(self) -> Iterator[Wave]:
        """In the order of the context."""
        for first, last in pairwise(self._wave_edges()):
            yield from self._waves_within(first, last)

    def _wave_edges(self) -> list[int]:
        """Block edges between waves, a multiple of `cp_size` blocks apart where blocks fit a wave."""
        num_tokens = self.mask.block_edges[-1]
        edges = [self.start, *self.mask.edges_within(self.start, num_tokens + 1)]
        largest = max((end - start for start, end in pairwise(edges)), default=1)
        per_rank = self.config.wave_tokens // largest
        stride = per_rank * self.cp_size or max(1, self.config.wave_tokens * self.cp_size // largest)
        return [edges[i] for i in range(0, len(edges) - 1, stride)] + [num_tokens]

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
            yield wave

    def _middle(self, start: int, end: int) -> int:
        """Where to halve a wave: the block edge nearest its middle, or the middle of a lone block."""
        middle = (start + end) // 2
        return min(self.mask.edges_within(start, end), key=lambda edge: abs(edge - middle), default=middle)

    def _balanced_wave(self, start: int, end: int) -> Wave:
        """The wave of the fewest pieces, among those about as fast as the fastest that was looked at.

        Teams share the tokens evenly, and so the KV; or else the work, of which the first block has less.
        The search ends with one about as fast as an even share of the work. `MOST_PIECES` bounds it.
        """
        edges = (start, *self.mask.edges_within(start, end), end)
        blocks = [Range(left, right) for left, right in pairwise(edges) if left < right]
        found = [self._wave(self._runs(blocks))]
        block_costs = [segment.cost(self.mask, self.costs) for segment in found[0]]
        slowest = [slowest_rank(found[0], self.mask, self.costs)]
        even = [1.0] * len(blocks)
        ways = product(self._ways_to_spread(len(blocks)), (even, block_costs))
        for (num_whole, num_teams), weights in ways:
            if slowest[-1] <= WHOLE_BLOCK_TOLERANCE * sum(block_costs) / self.cp_size:
                break
            teams = self._teams(blocks[num_whole:], weights[num_whole:], num_teams)
            found.append(self._wave(self._runs(blocks[:num_whole]) + teams))
            slowest.append(slowest_rank(found[-1], self.mask, self.costs))
        bound = WHOLE_BLOCK_TOLERANCE * min(slowest)
        return next(wave for wave, cost in zip(found, slowest, strict=True) if cost <= bound)

    def _ways_to_spread(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """Numbers of whole blocks, and of teams that share the others; those of fewer pieces first."""
        most_pieces = max(MOST_PIECES, 2 * self.cp_size)
        in_rounds = num_blocks // self.cp_size * self.cp_size
        for num_whole in dict.fromkeys((in_rounds, max(0, in_rounds - self.cp_size))):
            num_spread = num_blocks - num_whole
            num_teams = min(num_spread, self.cp_size)
            while num_teams and 2 * num_spread * self.cp_size <= most_pieces * num_teams:
                yield num_whole, num_teams
                num_teams //= 2

    def _runs(self, blocks: list[Range]) -> list[Source]:
        """Whole blocks, one run of neighbours a rank."""
        return [Source(*block, i * self.cp_size // len(blocks)) for i, block in enumerate(blocks)]

    def _teams(self, blocks: list[Range], weights: list[float], num_teams: int) -> list[Source]:
        """Runs of neighbouring blocks, each spread over a team of ranks: their share of the weight."""
        pieces: list[Source] = []
        first_rank, weight = 0, 0.0
        for team, (left, right) in enumerate(pairwise(even_edges(0, len(blocks), num_teams)), start=1):
            weight += sum(weights[left:right])
            share = round(self.cp_size * weight / sum(weights))
            last_rank = min(max(share, first_rank + 1), self.cp_size - num_teams + team)
            for block in blocks[left:right]:
                pieces += _zigzag(*block, range(first_rank, last_rank))
            first_rank = last_rank
        return pieces

    def _wave(self, pieces: list[Source]) -> Wave:
        recompute = self.config.anchor == "recompute"
        return tuple(
            Segment(*piece, self.mask.num_anchor_tokens(piece.start) if recompute else 0) for piece in pieces
        )


def _zigzag(start: int, end: int, ranks: range) -> list[Source]:
    """[start, end) in 2 * n even pieces; the i-th of n ranks owns pieces i and 2 * n - 1 - i."""
    last = 2 * len(ranks) - 1
    pieces: list[Source] = []
    for i, (left, right) in enumerate(pairwise(even_edges(start, end, last + 1))):
        owner = ranks[min(i, last - i)]
        if pieces and pieces[-1].owner == owner:
            pieces[-1] = Source(pieces[-1].start, right, owner)
        elif left < right:
            pieces.append(Source(left, right, owner))
    return pieces
