"""Bands of rows, and the keys that they see, in layers with a mask of their own (`LayerMask.bands`).

Shapes: tokens first, then b = 1, np query heads and ng KV heads of this TP rank, hn head size.
"""

from collections.abc import Callable, Sequence

from megatron_star.algorithm.kv_pieces import KvPiece, whole
from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial
from megatron_star.planning.layer_mask import Band

Attend = Callable[..., Partial]
"""An `AttentionKernel` with its softmax scale."""


def set_band(
    partials: PartialSum, attend: Attend, band: Band, first_row: int, pieces: Sequence[KvPiece]
) -> None:
    """The rows of a band, from `first_row` on, attend to all that they see, which these pieces have."""
    start, end = first_row, first_row + band.end - band.start
    _, _, key, value = whole(pieces, band.first, band.end)
    part = attend(partials.query[start:end], key, value, causal=True, window=band.window)
    partials.set_rows(start, end, part)


def add_in_band(partials: PartialSum, attend: Attend, band: Band, first_row: int, piece: KvPiece) -> None:
    """The rows of a band, from `first_row` on, attend to what they see of a piece, which is in the band.

    The piece ends with the rows' own tokens, or all of it is before them.
    """
    to_row = first_row - band.start
    if piece.end == band.end:
        query = partials.query[first_row : band.end + to_row]
        causal = {"causal": True, "window": band.window} if len(query) > 1 else {"causal": False}
        partials.add_rows(first_row, band.end + to_row, attend(query, *piece[2:], **causal))
        return
    seeing_all, seeing_some = readers_of(band, piece.start, piece.end)
    if seeing_all:
        rows = slice(seeing_all.start + to_row, seeing_all.stop + to_row)
        partials.add_rows(rows.start, rows.stop, attend(partials.query[rows], *piece[2:], causal=False))
    if seeing_some:
        rows = slice(seeing_some.start + to_row, seeing_some.stop + to_row)
        seen = piece.cut(seeing_some.start - band.window + 1, piece.end)
        # Each row sees one token less than the one before it: from the last row and token on, that is causal.
        tensors = (tensor.flip(0) for tensor in (partials.query[rows], *seen[2:]))
        out, lse = attend(*tensors, causal=True)
        partials.add_rows(rows.start, rows.stop, Partial(out.flip(2), lse.flip(2)))


def readers_of(band: Band, start: int, end: int) -> tuple[range, range]:
    """The positions in a band that see all of the tokens [start, end) before it, and those that see the end
    of them only."""
    if band.window is None:
        return range(band.start, band.end), range(0)
    last_full = max(band.start, min(band.end, start + band.window))
    last = max(last_full, min(band.end, end + band.window - 1))
    return range(band.start, last_full), range(last_full, last)
