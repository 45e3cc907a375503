"""What a rank reads while it encodes a wave of a plan, and what crosses ranks for it: integers only."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range, joined_ranges
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.segment import Segment, Source, Wave


class Read(NamedTuple):
    """One source as this rank uses it: these of its wave's rows attend to it.

    `rows` are disjoint ranges of the packed rows; empty if the rank only takes part in the transfer.
    """

    source: Source
    rows: tuple[Range, ...]
    crosses_ranks: bool


def wave_reads(
    plan: ContextPlan, wave: Wave, cp_rank: int, mask: LayerMask | None = None
) -> tuple[Read, ...]:
    """What this rank reads in a wave, in the order in which every rank goes through the transfers.

    A source is as long as can be: its tokens lie side by side on one rank, and the same segments attend to
    all of them.

    Args:
        mask: of the layers that read, if it is their own.
    """
    rows_of_segment = _packed_rows(wave, cp_rank)
    reads: list[Read] = []
    for tokens, readers in _ranges_and_readers(plan, wave, mask):
        rows = joined_ranges(rows_of_segment[index] for index in readers.of_rank(cp_rank))
        for source in plan.owners_of(tokens):
            crosses_ranks = readers.are_elsewhere_than(source.owner)
            if rows or crosses_ranks:
                reads.append(Read(source, rows, crosses_ranks))
    return tuple(reads)


class _Readers:
    """Segments of a wave that attend to the same tokens."""

    def __init__(self) -> None:
        self._by_rank: defaultdict[int, set[int]] = defaultdict(set)
        self._count = 0

    def add(self, index: int, owner: int) -> None:
        """The segment at this index of the wave begins to attend."""
        self._by_rank[owner].add(index)
        self._count += 1

    def remove(self, index: int, owner: int) -> None:
        """It attends no longer."""
        self._by_rank[owner].remove(index)
        self._count -= 1

    def of_rank(self, rank: int) -> list[int]:
        """The indices of those that this rank owns."""
        return sorted(self._by_rank[rank])

    def are_elsewhere_than(self, rank: int) -> bool:
        """Whether another rank owns one of them."""
        return self._count > len(self._by_rank[rank])


def _ranges_and_readers(
    plan: ContextPlan, wave: Wave, mask: LayerMask | None
) -> Iterator[tuple[Range, _Readers]]:
    """The tokens that a wave attends to, in order, cut wherever the segments that do so change.

    The readers are to be used before the next range is asked for.
    """
    first_seen, last_seen = defaultdict(list), defaultdict(list)
    for index, segment in enumerate(wave):
        for start, end in _sources(plan, segment, mask):
            first_seen[start].append(index)
            last_seen[end].append(index)
    readers = _Readers()
    for start, end in pairwise(sorted(first_seen.keys() | last_seen.keys())):
        for index in last_seen.get(start, ()):
            readers.remove(index, wave[index].owner)
        for index in first_seen.get(start, ()):
            readers.add(index, wave[index].owner)
        yield Range(start, end), readers


def _sources(plan: ContextPlan, segment: Segment, mask: LayerMask | None) -> tuple[Range, ...]:
    """Anchor copies in front of a segment stand for the anchor, and never for the tokens before the segment:
    a layer with a mask of its own reads these where they are stored.
    """
    return segment.sources(plan.mask) if mask is None else mask.sources(segment.start, segment.end)


def _packed_rows(wave: Wave, cp_rank: int) -> dict[int, Range]:
    """Rows of this rank's segments, by their index in the wave; the anchor copies in front are left out."""
    rows, offset = {}, 0
    for index, segment in enumerate(wave):
        if segment.owner == cp_rank:
            rows[index] = Range(offset + segment.recomputed, offset + segment.num_rows)
            offset += segment.num_rows
    return rows
