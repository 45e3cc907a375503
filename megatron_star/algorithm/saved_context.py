"""What an encoded context consists of, to be kept elsewhere by these ranks and filled in again by others.

Everything is known by its context tokens and not by its rank. So what two ranks have saved, one or three can
read: each takes what its own plan says that it owns.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size. Layers are numbered from 1.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext, empty_like_rows, fill_rows
from megatron_star.algorithm.kv_pieces import KvPiece
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range
from megatron_star.planning.passing import Named, named_blocks

KEY, VALUE, POSITIONS = "key", "value", "named"


class SavedTensor(NamedTuple):
    """One tensor of a rank's share.

    Attributes:
        tokens: the context tokens of its rows, in their order; none where rows are no tokens.
        tensor: [rows, ..]; a view, which never changes.
    """

    name: str
    tokens: tuple[Range, ...]
    tensor: Tensor


class SavedShare(Protocol):
    """What one rank has saved, wherever that is."""

    def tokens(self, name: str) -> tuple[Range, ...] | None:
        """The context tokens of a tensor's rows; None if it is not here."""

    def read(self, name: str) -> Tensor:
        """A tensor that is here; raises OSError or ValueError if it cannot be read."""


class Incomplete(ValueError):
    """What was saved does not have all of a context."""


def saved_tensors(context: EncodedContext, num_layers: int) -> Iterator[SavedTensor]:
    """All that this rank holds of an encoded context, without those that it extends."""
    for layer in range(1, num_layers + 1):
        if rows := context.own_rows(layer):
            for index, tensor in enumerate(rows.tensors):
                yield SavedTensor(f"{layer}.{index}", rows.tokens, tensor)
        for block, (positions, copies) in context.named_blocks(layer).items():
            yield SavedTensor(f"{layer}.named.{block}", (), positions)
            for what, copy in zip((KEY, VALUE), copies or (), strict=False):
                yield SavedTensor(f"{layer}.{what}.{block}", (), copy)


class Filler:
    """Fills contexts with what was saved, instead of encoding them. Threads may fill different layers.

    Attributes:
        masks: that layers have of their own.
        dtype: that is computed in.
    """

    def __init__(
        self,
        masks: Sequence[LayerMask | None],
        dtype: torch.dtype,
        to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.masks, self.dtype, self._to_device = masks, dtype, to_device

    def fill(self, context: EncodedContext, layer_number: int, shares: Sequence[SavedShare]) -> None:
        """Let a context have of one layer what its plan says that this rank owns.

        Args:
            shares: of all ranks that saved it; one that is not needed is not touched.

        Raises:
            OSError, ValueError: it cannot be read, or is not all there.
        """
        reader = _LayerReader(layer_number, shares, self._to_device)
        plan, rank, mask = context.plan, context.cp_rank, self.masks[layer_number - 1]
        end = plan.num_tokens
        if mask:
            kept = plan.owners_of(Range(max(plan.start, mask.kept_from(end)), end))
            found = [reader.rows(Range(s.start, s.end)) for s in kept if s.owner == rank]
            pieces = [KvPiece(*rows) for of_source in found for rows in of_source]
            context.keep_recent(layer_number, mask, pieces, end)
            return
        for segment in plan.owned(rank):
            for start, _, *rows in reader.rows(Range(segment.start, segment.end)):
                context.fill(layer_number, start, tuple(rows), self.dtype)
        for wave in plan.waves:
            for named in named_blocks(plan, wave):
                if named.owner == rank:
                    self._fill_named(context, layer_number, named, reader)

    def _fill_named(
        self, context: EncodedContext, layer_number: int, named: Named, reader: "_LayerReader"
    ) -> None:
        """The last layer passes no keys, so nobody has saved any."""
        positions = reader.named(POSITIONS, named.block)
        if positions is None:
            return
        if named.is_whole:
            context.keep_named_rows(layer_number, named.block, positions)
            return
        copies = reader.named(KEY, named.block), reader.named(VALUE, named.block)
        if copies[0] is None:
            copies = self._copies(context, named, positions, reader)
        context.keep_named(layer_number, named.block, positions, copies)

    def _copies(
        self, context: EncodedContext, named: Named, positions: Tensor, reader: "_LayerReader"
    ) -> KeyValue:
        """Of the keys at these positions of a block, with their values."""
        start, end = named.tokens
        found = reader.rows(named.tokens)
        block = empty_like_rows(context.kv_format, end - start, tuple(found[0][2:]), self.dtype)
        for first, _, *rows in found:
            fill_rows(block, first - start, tuple(rows))
        return block.read_of_heads(positions.to(torch.int64))


class _LayerReader:
    """Reads each tensor of a layer at most once, and only if something of it is wanted."""

    def __init__(
        self, layer_number: int, shares: Sequence[SavedShare], to_device: Callable[[Tensor], Tensor]
    ) -> None:
        self._layer_number, self._shares = layer_number, shares
        self._read = cache(lambda share, name: to_device(shares[share].read(name)))

    def rows(self, tokens: Range) -> list[tuple]:
        """All of a range of tokens, by rising position, in pieces: start, end, and rows of each tensor.

        Raises:
            Incomplete: something is missing.
        """
        found: list[tuple] = []
        for index in range(len(self._shares)):
            if sum(end - start for start, end, *_ in found) == tokens.end - tokens.start:
                break
            found += self._rows_of_share(index, tokens)
        found.sort(key=itemgetter(0))
        edges = [tokens.start, *(piece[1] for piece in found)]
        if [piece[0] for piece in found] != edges[:-1] or edges[-1] != tokens.end:
            raise Incomplete(f"layer {self._layer_number} has not all of the tokens {tuple(tokens)}")
        return found

    def named(self, what: str, block: int) -> Tensor | None:
        """Of what a block names, if it was saved."""
        name = f"{self._layer_number}.{what}.{block}"
        for index, share in enumerate(self._shares):
            if share.tokens(name) is not None:
                return self._read(index, name)
        return None

    def _rows_of_share(self, index: int, tokens: Range) -> Iterator[tuple]:
        ranges = self._shares[index].tokens(f"{self._layer_number}.0") or ()
        first_row = 0
        for start, end in ranges:
            row, first_row = first_row, first_row + end - start
            first, last = max(start, tokens.start), min(end, tokens.end)
            if first < last:
                rows = slice(row + first - start, row + last - start)
                yield first, last, *(each[rows] for each in self._tensors(index))

    def _tensors(self, index: int) -> Iterator[Tensor]:
        share = self._shares[index]
        for number in count():
            name = f"{self._layer_number}.{number}"
            if share.tokens(name) is None:
                return
            yield self._read(index, name)
