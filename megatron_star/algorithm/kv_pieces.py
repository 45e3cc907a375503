"""KV of ranges of context tokens, wherever it was stored or received.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor


class KvPiece(NamedTuple):
    """Keys and values [end - start, 1, ng, hn] of the tokens at the positions [start, end)."""

    start: int
    end: int
    key: Tensor
    value: Tensor

    def cut(self, start: int, end: int) -> Self:
        """Views of what of it lies in [start, end); at least one token does."""
        start, end = max(start, self.start), min(end, self.end)
        rows = slice(start - self.start, end - self.start)
        return type(self)(start, end, self.key[rows], self.value[rows])


def pieces_within(pieces: Iterable[KvPiece], start: int, end: int) -> list[KvPiece]:
    """Views of their parts that lie in [start, end), in the given order."""
    return [piece.cut(start, end) for piece in pieces if piece.start < end and start < piece.end]


def joined(pieces: Sequence[KvPiece]) -> KvPiece:
    """Pieces that follow each other as one: copied, unless there is one only."""
    if len(pieces) == 1:
        return pieces[0]
    assert all(left.end == right.start for left, right in zip(pieces, pieces[1:], strict=False))
    key, value = (torch.cat([piece[i] for piece in pieces]) for i in (2, 3))
    return KvPiece(pieces[0].start, pieces[-1].end, key, value)


def whole(pieces: Iterable[KvPiece], start: int, end: int) -> KvPiece:
    """All of [start, end), which these pieces, in any order, have; each token once."""
    found = joined(sorted(pieces_within(pieces, start, end), key=lambda piece: piece.start))
    assert (found.start, found.end) == (start, end)
    return found
