"""What a rank reads while it encodes a wave of a plan, and what crosses ranks for it: integers only."""

from typing import NamedTuple

from megatron_star.planning.plan import Source, Wave


class Read(NamedTuple):
    """One source as this rank uses it: these of its wave's rows attend to it.

    `rows` are disjoint ranges of the packed rows; empty if the rank only takes part in the transfer.
    """

    source: Source
    rows: tuple[tuple[int, int], ...]
    crosses_ranks: bool


def wave_reads(wave: Wave, cp_rank: int, seams: tuple[int, ...] = ()) -> tuple[Read, ...]:
    """What this rank reads in a wave, in the order in which every rank goes through the transfers."""
    rows_of_segment = _packed_rows(wave, cp_rank)
    reads: list[Read] = []
    for source, readers in joined_sources(wave, seams).items():
        rows: list[tuple[int, int]] = []
        for index in readers:
            if index in rows_of_segment:
                _append_range(rows, *rows_of_segment[index])
        crosses_ranks = any(wave[index].owner != source.owner for index in readers)
        if rows or crosses_ranks:
            reads.append(Read(source, tuple(rows), crosses_ranks))
    return tuple(reads)


def joined_sources(wave: Wave, seams: tuple[int, ...] = ()) -> dict[Source, tuple[int, ...]]:
    """A wave's sources in order, each with the indices of the segments that attend to it; alike on all ranks.

    Sources that lie side by side on one rank are one where the same segments attend to them, so that they
    are sent at once. None reaches over a seam, where another context's storage begins.
    """
    readers: dict[Source, list[int]] = {}
    for index, segment in enumerate(wave):
        for source in segment.sources:
            readers.setdefault(source, []).append(index)
    joined: list[tuple[Source, list[int]]] = []
    for source in sorted(readers):
        start = source.start
        if joined and joined[-1][1] == readers[source] and start not in seams:
            left = joined[-1][0]
            if (left.end, left.owner) == (start, source.owner):
                start = joined.pop()[0].start
        joined.append((Source(start, source.end, source.owner), readers[source]))
    return {source: tuple(indices) for source, indices in joined}


def _packed_rows(wave: Wave, cp_rank: int) -> dict[int, tuple[int, int]]:
    """Rows of this rank's segments, by their index in the wave; the anchor copies in front are left out."""
    rows, offset = {}, 0
    for index, segment in enumerate(wave):
        if segment.owner == cp_rank:
            first = offset + segment.recomputed
            offset = first + segment.num_tokens
            rows[index] = (first, offset)
    return rows


def _append_range(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Append [start, end), joined to the last range where it continues it."""
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))
