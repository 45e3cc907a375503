"""What an encoded context consists of, to be kept elsewhere by these ranks and filled in again by others.

Everything is known by its context tokens and not by its rank. So what two ranks have saved, one or three can
read: each takes what its own plan says that it owns.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size. Layers are numbered from 1.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import KvPiece, pieces_within, whole
from megatron_star.attention.distinct_keys import of_heads
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range
from megatron_star.planning.passing import Named, named_blocks

KEY, VALUE, POSITIONS = "key", "value", "positions"


class SavedTensor(NamedTuple):
    """One tensor of a rank's share.

    Attributes:
        ranges: the context tokens of its rows, in their order; none where rows are no tokens.
        pieces: which follow each other: together [rows, ..]. Views, which never change.
    """

    name: str
    ranges: tuple[Range, ...]
    pieces: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all pieces together."""
        return sum(piece.size(0) for piece in self.pieces), *self.pieces[0].shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Of every piece."""
        return self.pieces[0].dtype

    @property
    def num_bytes(self) -> int:
        """Of all pieces together."""
        return sum(piece.nbytes for piece in self.pieces)


class SavedShare(Protocol):
    """What one rank has saved, wherever that is."""

    def ranges(self, name: str) -> tuple[Range, ...] | None:
        """The context tokens of a tensor's rows; None if it is not here."""

    def read(self, name: str) -> Tensor:
        """A tensor that is here; raises OSError or ValueError if it cannot be read."""


class Incomplete(ValueError):
    """What was saved does not have all of a context."""


def tensor_name(layer_number: int, what: str, block: int | None = None) -> str:
    """`3.key`, or `3.key.7` of what block 7 names."""
    return f"{layer_number}.{what}" + ("" if block is None else f".{block}")


def saved_tensors(context: EncodedContext, num_layers: int) -> Iterator[SavedTensor]:
    """All that this rank holds of an encoded context, without those that it extends."""
    for layer in range(1, num_layers + 1):
        if pieces := context.own_pieces(layer):
            ranges = tuple(Range(piece.start, piece.end) for piece in pieces)
            yield SavedTensor(tensor_name(layer, KEY), ranges, tuple(piece.key for piece in pieces))
            yield SavedTensor(tensor_name(layer, VALUE), ranges, tuple(piece.value for piece in pieces))
        for block, (positions, copies) in context.named_blocks(layer).items():
            yield SavedTensor(tensor_name(layer, POSITIONS, block), (), (positions,))
            for what, copy in zip((KEY, VALUE), copies or (), strict=False):
                yield SavedTensor(tensor_name(layer, what, block), (), (copy,))


def fill_layer(
    context: EncodedContext,
    layer_number: int,
    mask: LayerMask | None,
    shares: Sequence[SavedShare],
    to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Let a context have of one layer what its plan says that this rank owns, instead of encoding it.

    Args:
        mask: that the layer has of its own.
        shares: of all ranks that saved it.

    Raises:
        OSError, ValueError: it cannot be read, or is not all there.
    """
    reader = _LayerReader(layer_number, shares, to_device)
    plan, rank = context.plan, context.cp_rank
    end = plan.num_tokens
    if mask:
        kept = plan.owners_of(Range(max(plan.start, mask.kept_from(end)), end))
        wanted = [Range(source.start, source.end) for source in kept if source.owner == rank]
        context.keep_recent(layer_number, mask, [reader.piece(tokens) for tokens in wanted], end)
        return
    for segment in plan.owned(rank):
        for piece in reader.pieces(Range(segment.start, segment.end)):
            context.store(layer_number, piece.start, piece.key, piece.value)
    for wave in plan.waves:
        for named in named_blocks(plan, wave):
            if named.owner == rank:
                _fill_named(context, layer_number, named, reader)


def _fill_named(context: EncodedContext, layer_number: int, named: Named, reader: "_LayerReader") -> None:
    """The last layer passes no keys, so nobody has saved any."""
    positions = reader.named(POSITIONS, named.block)
    if positions is None:
        return
    if named.is_whole:
        context.keep_named_rows(layer_number, named.block, positions)
        return
    copies = reader.named(KEY, named.block), reader.named(VALUE, named.block)
    if copies[0] is None:
        block = reader.piece(named.tokens)
        copies = tuple(of_heads(each, positions.to(torch.int64)) for each in (block.key, block.value))
    context.keep_named(layer_number, named.block, positions, copies)


class _LayerReader:
    """Reads each tensor of a layer at most once, and only if something of it is wanted."""

    def __init__(
        self, layer_number: int, shares: Sequence[SavedShare], to_device: Callable[[Tensor], Tensor]
    ) -> None:
        self._layer_number, self._shares = layer_number, shares
        self._read = cache(lambda share, name: to_device(shares[share].read(name)))

    def pieces(self, tokens: Range) -> list[KvPiece]:
        """All of a range of tokens, by rising position; raises Incomplete if something is missing."""
        names = tensor_name(self._layer_number, KEY), tensor_name(self._layer_number, VALUE)
        found: list[KvPiece] = []
        for index, share in enumerate(self._shares):
            if sum(piece.end - piece.start for piece in found) == tokens.end - tokens.start:
                break  # a share is not even opened without need
            ranges = share.ranges(names[0]) or ()
            if any(start < tokens.end and tokens.start < end for start, end in ranges):
                rows = (self._read(index, name).split([e - s for s, e in ranges]) for name in names)
                every = (KvPiece(*r, key, value) for r, key, value in zip(ranges, *rows, strict=True))
                found += pieces_within(every, *tokens)
        found.sort(key=lambda piece: piece.start)
        edges = [tokens.start, *(piece.end for piece in found)]
        if [piece.start for piece in found] != edges[:-1] or edges[-1] != tokens.end:
            raise Incomplete(f"layer {self._layer_number} has not all of the tokens {tuple(tokens)}")
        return found

    def piece(self, tokens: Range) -> KvPiece:
        """The same in one piece."""
        return whole(self.pieces(tokens), *tokens)

    def named(self, what: str, block: int) -> Tensor | None:
        """Of what a block names, if it was saved."""
        name = tensor_name(self._layer_number, what, block)
        for index, share in enumerate(self._shares):
            if share.ranges(name) is not None:
                return self._read(index, name)
        return None
