"""One rank's share of an encoded context: its keys and values.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size. Layers are numbered from 1.
After a context's tokens there is spare capacity, which one tail may use: a new token then attends to both in
one call. A layer with a mask of its own keeps only the end of a context (`recent_kv.py`).
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Self

import torch
from torch import Tensor

from megatron_star.algorithm.kv_pieces import KvPiece, pieces_within
from megatron_star.algorithm.recent_kv import copied
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.stored_kv import AS_COMPUTED, HeldKv, KvFormat, StoredKv
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.plan import ContextPlan, Source


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
        self.num_local_tokens, self.kv_format = plan.num_owned_tokens(cp_rank), kv_format
        self._starts: list[int] = []
        self._offsets: list[int] = []
        self._layers: dict[int, StoredKv] = {}
        self._recent: dict[int, list[KvPiece]] = {}
        self._named_copies: dict[tuple[int, int], KeyValue] = {}
        self._named_rows: dict[tuple[int, int], Tensor] = {}
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

    def keep_named(self, layer_number: int, block: int, named: KeyValue) -> None:
        """Keep copies of the keys that a block names, with their values, [named, 1, ng, hn] each."""
        self._named_copies[layer_number, block] = named

    def keep_named_rows(self, layer_number: int, block: int, rows: Tensor) -> None:
        """Keep where they are in this rank's storage, [named, ng], where all of the block is there."""
        self._named_rows[layer_number, block] = rows.to(torch.int32)

    def named(self, layer_number: int, block: int, num_keys: int) -> KeyValue:
        """The first so many keys that a block names, with their values; of this context or of a parent."""
        place = layer_number, block
        if place in self._named_copies:
            return tuple(each[:num_keys] for each in self._named_copies[place])
        if place in self._named_rows:
            rows = self._named_rows[place][:num_keys].to(torch.int64)
            return self._layers[layer_number].read_of_heads(rows)
        return self.parent.named(layer_number, block, num_keys)

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
