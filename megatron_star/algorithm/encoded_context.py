"""One rank's share of an encoded context: its keys and values.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size. Layers are numbered from 1.
After a context's tokens there is spare capacity, which one tail may use: a new token then attends to both in
one call. A layer with a mask of its own keeps only the end of a context (`recent_kv.py`).
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron_star.algorithm.kv_pieces import KvPiece, pieces_within
from megatron_star.algorithm.recent_kv import copied
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.stored_kv import AS_COMPUTED, HeldKv, KvFormat, StoredKv
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range
from megatron_star.planning.plan import ContextPlan, Source


class SavedRows(NamedTuple):
    """Stored tokens of a layer.

    Attributes:
        tokens: ranges of the context, whose rows follow each other.
        tensors: views of what a `StoredKv`, or a `KvPiece`, has of them: keys and their like first.
    """

    tokens: tuple[Range, ...]
    tensors: tuple[Tensor, ...]


def empty_like_rows(
    kv_format: KvFormat, num_tokens: int, rows: tuple[Tensor, ...], dtype: torch.dtype
) -> StoredKv:
    """Storage for so many tokens that are stored as these are; `dtype`: that was computed in."""
    key_and_value = rows[0], rows[len(rows) // 2]
    return kv_format.empty(
        num_tokens, tuple(e.new_empty((0, *e.shape[1:]), dtype=dtype) for e in key_and_value)
    )


def fill_rows(stored: StoredKv, first_row: int, rows: tuple[Tensor, ...]) -> None:
    """Put rows, as they are stored, where they belong."""
    for to, each in zip(stored.tensors(), rows, strict=True):
        to[first_row : first_row + each.size(0)] = each


class EncodedContext:
    """One rank's share of an encoded context. It grows while it is encoded and never changes afterwards.

    A context that extends the first tokens of another one (`parent`), up to `plan.start`, holds what its own
    plan encodes and reads the rest there.
    """

    def __init__(
        self,
        plan: ContextPlan,
        cp_rank: int,
        parent: Self | None = None,
        *,
        keeps_all: bool = False,
        is_long: bool = False,
        kv_format: KvFormat = AS_COMPUTED,
    ) -> None:
        """
        Args:
            keeps_all: also of layers with a mask of their own, whose tokens nobody needs to answer.
            is_long: it is rotated, as what follows it, with longrope's long factors (`model/longrope.py`).
            kv_format: of layers without a mask of their own.
        """
        assert bool(plan.start) == bool(parent) and (not parent or plan.start <= parent.plan.num_tokens)
        assert parent is None or parent.is_long == is_long
        self.plan, self.parent, self.keeps_all, self.is_long = plan, parent, keeps_all, is_long
        self.cp_rank = cp_rank
        self.num_local_tokens, self.kv_format = plan.num_owned_tokens(cp_rank), kv_format
        self._starts: list[int] = []
        self._offsets: list[int] = []
        self._layers: dict[int, StoredKv] = {}
        self._recent: dict[int, list[KvPiece]] = {}
        self._named_copies: dict[tuple[int, int], KeyValue] = {}
        self._named_positions: dict[tuple[int, int], Tensor] = {}
        self._user_of_spare: weakref.ref[object] | None = None
        offset = 0
        for segment in plan.owned(cp_rank):
            self._starts.append(segment.start)
            self._offsets.append(offset)
            offset += segment.num_tokens

    def offset_of(self, token: int) -> int:
        """Row in this rank's storage of a context token that it owns."""
        segment = bisect_right(self._starts, token) - 1
        return self._offsets[segment] + token - self._starts[segment]

    def num_local_before(self, token: int) -> int:
        """Rows of this rank's storage that are of tokens before this one: the first ones."""
        index = bisect_right(self._starts, token - 1) - 1
        if index < 0:
            return 0
        end = self._offsets[index + 1] if index + 1 < len(self._offsets) else self.num_local_tokens
        return min(self._offsets[index] + token - self._starts[index], end)

    def store(self, layer_number: int, first_token: int, key: Tensor, value: Tensor) -> None:
        """Keep [tokens, 1, ng, hn] of consecutive owned tokens, of which `first_token` is the first."""
        if layer_number not in self._layers:
            num_tokens = self.num_local_tokens + self.num_spare_tokens
            self._layers[layer_number] = self.kv_format.empty(num_tokens, (key, value))
        self._layers[layer_number].write(self.offset_of(first_token), key, value)

    def keep_exact(self, layer_number: int, first_token: int, key: Tensor, value: Tensor) -> None:
        """Let `read` and `named` find what was stored as it was computed, until `forget_exact`."""
        self._layers[layer_number].keep_exact(self.offset_of(first_token), key, value)

    def forget_exact(self, layer_number: int) -> None:
        """From now on they find what is stored."""
        if layer_number in self._layers:
            self._layers[layer_number].forget_exact()

    def read(self, layer_number: int, source: Source) -> KeyValue:
        """A stored source, [tokens, 1, ng, hn] each: views, where it is stored as it was computed."""
        if source.start < self.plan.start:
            return self.parent.read(layer_number, source)
        rows = slice(self.offset_of(source.start), self.offset_of(source.end - 1) + 1)
        return self._layers[layer_number].read(rows)

    def held(self, layer_number: int, num_contiguous: int = 0, end: int | None = None) -> Iterator[HeldKv]:
        """All that this rank holds of a layer, in one piece for each context of the chain that has any.

        Args:
            num_contiguous: with so many tokens of the tail that uses the spare capacity.
            end: without tokens from here on, for a context that extends the first ones.
        """
        if self.parent:
            yield from self.parent.held(layer_number, end=self.plan.start)
        num_rows = self.num_local_tokens if end is None else self.num_local_before(end)
        if num_rows:
            yield self._layers[layer_number].held(num_rows + num_contiguous)

    def recent(self, layer_number: int) -> list[KvPiece]:
        """What this rank holds of a layer with a mask of its own, by rising position, parents' included."""
        before = self.parent.recent(layer_number) if self.parent else []
        return pieces_within(before, 0, self.plan.start) + self._recent.get(layer_number, [])

    def keep_recent(self, layer_number: int, mask: LayerMask, new: Iterable[KvPiece], end: int) -> None:
        """Keep of a layer with this mask what comes after `end` can see; a parent keeps its own tokens.

        new: what this rank has encoded of the last wave, by rising position; it ends at `end`.
        """
        first = self.plan.start if self.keeps_all else max(self.plan.start, mask.kept_from(end))
        pieces = [*self._recent.get(layer_number, ()), *new]
        self._recent[layer_number] = copied(pieces_within(pieces, first, end))

    def own_rows(self, layer_number: int) -> SavedRows | None:
        """What this rank holds of a layer without its parents', as it is stored; None where it is nothing."""
        if layer_number in self._layers:
            tokens = tuple(Range(s.start, s.end) for s in self.plan.owned(self.cp_rank))
            stored = self._layers[layer_number].tensors()
            return SavedRows(tokens, tuple(each[: self.num_local_tokens] for each in stored))
        pieces = self._recent.get(layer_number)
        if not pieces:
            return None
        tokens = tuple(Range(piece.start, piece.end) for piece in pieces)
        return SavedRows(tokens, tuple(torch.cat([piece[i] for piece in pieces]) for i in (2, 3)))

    def fill(self, layer_number: int, first_token: int, rows: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Keep of consecutive owned tokens what `own_rows` had of them.

        dtype: that was computed in.
        """
        if layer_number not in self._layers:
            num_tokens = self.num_local_tokens + self.num_spare_tokens
            self._layers[layer_number] = empty_like_rows(self.kv_format, num_tokens, rows, dtype)
        fill_rows(self._layers[layer_number], self.offset_of(first_token), rows)

    def keep_named(self, layer_number: int, block: int, positions: Tensor, named: KeyValue) -> None:
        """Keep copies of the keys that a block names, with their values, [named, 1, ng, hn] each.

        positions: of them in the block, [named, ng].
        """
        self._named_positions[layer_number, block] = positions.to(torch.int32)
        self._named_copies[layer_number, block] = named

    def keep_named_rows(self, layer_number: int, block: int, positions: Tensor) -> None:
        """Keep where they are in the block, [named, ng], where all of it is in this rank's storage."""
        self._named_positions[layer_number, block] = positions.to(torch.int32)

    def named(self, layer_number: int, block: int, num_keys: int) -> KeyValue:
        """The first so many keys that a block names, with their values; of this context or of a parent."""
        place = layer_number, block
        if place in self._named_copies:
            return tuple(each[:num_keys] for each in self._named_copies[place])
        if place in self._named_positions:
            rows = self._named_positions[place][:num_keys] + self.offset_of(self.plan.mask.block_edges[block])
            return self._layers[layer_number].read_of_heads(rows.to(torch.int64))
        return self.parent.named(layer_number, block, num_keys)

    def named_blocks(self, layer_number: int) -> dict[int, tuple[Tensor, KeyValue | None]]:
        """For each block whose named keys this rank keeps: their positions, and the copies, if there are."""
        return {
            block: (positions, self._named_copies.get((layer, block)))
            for (layer, block), positions in self._named_positions.items()
            if layer == layer_number
        }

    def reserve_spare(self, tail: object) -> bool:
        """Whether this tail may use the spare capacity: no other may, as long as it lives."""
        if not self.num_spare_tokens or (self._user_of_spare and self._user_of_spare()):
            return False
        self._user_of_spare = weakref.ref(tail)
        return True

    def spare(self, layer_number: int) -> KeyValue:
        """A layer's spare capacity, after its tokens."""
        return self._layers[layer_number].read(slice(self.num_local_tokens, None))

    @property
    def num_spare_tokens(self) -> int:
        """Capacity after its tokens, in each layer without a mask of its own."""
        return self.kv_format.spare_capacity(self.num_local_tokens)

    @property
    def num_bytes(self) -> int:
        """Memory of this rank's share, with its spare capacity, without the parent's.

        Not counted is where named keys are: 4 bytes for each, in each layer and KV head.
        """
        recent = (piece[2:] for pieces in self._recent.values() for piece in pieces)
        besides = sum(key.nbytes + value.nbytes for key, value in (*recent, *self._named_copies.values()))
        return besides + sum(stored.num_bytes for stored in self._layers.values())
