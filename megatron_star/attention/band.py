"""Attention in a band, made of full and square causal attention: all that some kernels can do.

In a band, row i of sq sees the last `window` keys up to key i + sk - sq (fewer, where there are not so many
before it). Rows are taken in tiles of at most `window`. What the rows of a tile see, in three parts:

    keys    0 1 2   3 4   5 6 7
    row 0   x x x   x x   x . .
    row 1   . x x   x x   x x .
    row 2   . . x   x x   x x x
            corner  full  square
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial

AttendPiece = Callable[[Tensor, Tensor, Tensor, bool], Partial]
"""query, key, value, causal: every row sees every key, or row i of as many as keys the keys 0 .. i."""


class Sight(Enum):
    """Which keys of a piece its rows see; all but ALL are squares."""

    ALL = "every row sees every key"
    UP_TO_OWN = "row i sees the keys 0 .. i"
    FROM_OWN = "row i sees the keys i .."


class Piece(NamedTuple):
    """A part of a band."""

    rows: range
    keys: range
    sight: Sight


def band_pieces(num_rows: int, num_keys: int, window: int | None = None) -> list[Piece]:
    """The parts of a band, each of whose entries is in one of them; num_keys >= num_rows, window >= 1."""
    before = num_keys - num_rows  # keys before that of row 0
    # Rows of which the window hides no key. A tile may begin with one.
    unbounded = num_rows if window is None else min(num_rows, max(0, window - before))
    if unbounded == 1 < num_rows:
        unbounded = 0
    pieces = [
        Piece(range(unbounded), range(before), Sight.ALL),
        Piece(range(unbounded), range(before, before + unbounded), Sight.UP_TO_OWN),
    ]
    if window is not None:
        for tile in _tiles(range(unbounded, num_rows), window):
            pieces += _tile_pieces(tile, tile.start + before, window)
    return [piece for piece in pieces if piece.rows and piece.keys]


def _tiles(rows: range, most: int) -> list[range]:
    """As few as possible, of about the same size."""
    number = -(-len(rows) // most)
    edges = [rows.start + len(rows) * i // number for i in range(number + 1)] if number else []
    return [range(start, end) for start, end in zip(edges, edges[1:], strict=False)]


def _tile_pieces(rows: range, own_key: int, window: int) -> list[Piece]:
    """Corner, full part and square of at most `window` rows, the first of which is that of `own_key`."""
    first_key = own_key - window + 1
    corner = min(len(rows), window - 1)
    return [
        Piece(rows[:corner], range(first_key, first_key + corner), Sight.FROM_OWN),
        Piece(rows, range(first_key + corner, own_key), Sight.ALL),
        Piece(rows, range(own_key, own_key + len(rows)), Sight.UP_TO_OWN),
    ]


def attend_in_pieces(
    attend: AttendPiece, query: Tensor, key: Tensor, value: Tensor, window: int | None
) -> Partial:
    """Causal attention with sk >= sq and a window; see `AttentionKernel`."""
    partials = PartialSum(query, value.size(3))
    for rows, keys, sight in band_pieces(query.size(0), key.size(0), window):
        row_slice, key_slice = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        tensors = query[row_slice], key[key_slice], value[key_slice]
        if sight is Sight.FROM_OWN:
            reversed_out, reversed_lse = attend(*(tensor.flip(0) for tensor in tensors), True)
            part = Partial(reversed_out.flip(2), reversed_lse.flip(2))
        else:
            part = attend(*tensors, sight is Sight.UP_TO_OWN)
        partials.add_rows(rows.start, rows.stop, part)
    return partials.merged()
