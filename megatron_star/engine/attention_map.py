"""Where an answer looked in its context, as the answer has it: few pieces, small where it looked most."""

import heapq
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from megatron_star.algorithm.attention_map import Looks, piece_edges
from megatron_star.parallel.control import largest_on_driver, sum_on_driver

MOST_PIECES = 256


class MapPiece(NamedTuple):
    """Context tokens [start, end); `mass` and `peak` as in `algorithm/attention_map.py`."""

    start: int
    end: int
    mass: float
    peak: float


class AttentionMap(NamedTuple):
    """
    Attributes:
        pieces: of the whole context, in order, `MOST_PIECES` at most. The first token is one of its own.
        elsewhere: the mass that went to the query, the answer and sinks: with all pieces', 1.
        num_rows: of which these are means.
    """

    pieces: tuple[MapPiece, ...]
    elsewhere: float
    num_rows: int

    @classmethod
    def of_looks(cls, num_tokens: int, looks: Iterable[Looks]) -> Self:
        """Of all ranks' looks at a context of so many tokens, from at least one row."""
        all_masses, all_peaks = zip(*looks, strict=True)
        masses, peaks = torch.stack(all_masses).sum(0), torch.cat(all_peaks)
        masses, edges = masses / len(peaks), piece_edges(num_tokens)
        pieces = tuple(
            MapPiece(edges[first], edges[end], masses[first:end].sum().item(), _peak(peaks, first, end))
            for first, end in _ranges(peaks)
        )
        return cls(pieces, 1.0 - masses.sum().item(), len(peaks))


def gather_looks(looks: Looks, control: dist.ProcessGroup) -> Looks:
    """Of all ranks together, on the driver; called on all of them."""
    return Looks(sum_on_driver(looks.masses, control), largest_on_driver(looks.peaks, control))


def _peak(peaks: torch.Tensor, first: int, end: int) -> float:
    return peaks[:, first:end].amax(1).mean().item()


def _ranges(peaks: torch.Tensor) -> list[tuple[int, int]]:
    """Of pieces that are shown as one: a context's 127 parts, halved where peaks are highest."""
    num_pieces = peaks.size(1)
    edges = (
        [0, *torch.linspace(1, num_pieces, MOST_PIECES // 2).long().unique().tolist()] if num_pieces else []
    )
    ranges = list(pairwise(edges))
    largest_first = [(-_peak(peaks, *each), each) for each in ranges]
    heapq.heapify(largest_first)
    while largest_first and len(ranges) < MOST_PIECES:
        _, (first, end) = heapq.heappop(largest_first)
        if end - first > 1:
            middle = (first + end) // 2
            ranges.remove((first, end))
            for half in ((first, middle), (middle, end)):
                ranges.append(half)
                heapq.heappush(largest_first, (-_peak(peaks, *half), half))
    return sorted(ranges)
