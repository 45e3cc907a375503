"""Work in pieces that a CPU's cache holds."""

from collections.abc import Iterator

from torch import Tensor

from megatron_star.model import rotary

CACHE_BYTES = 1 << 20
"""Of the cache that a core has for itself (1 MB or more since 2018), what a piece of work may take."""


def cache_sized_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of these tensors' next rows (first dimension), so many that a CPU's cache holds them.

    Several operations on a piece, one after the other, then go over memory once. On another device, and where
    there are few rows, one piece is everything.
    """
    num_rows = tensors[0].size(0)
    row_bytes = sum(tensor.nbytes for tensor in tensors) // max(1, num_rows)
    rows = max(1, CACHE_BYTES // max(1, row_bytes)) if tensors[0].device.type == "cpu" else num_rows
    if rows >= num_rows:
        yield tensors
    else:
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """As `rotary.rotate`, whose four operations then go over memory once."""
    rotated = tensor.new_empty(tensor.shape)
    for piece, out, cosines, sines in cache_sized_pieces(tensor, rotated, cos, sin):
        rotary.rotate(piece, cosines, sines, out, interleaved=interleaved)
    return rotated
