"""Query and generated tokens of a sequence: their keys and values on its tail rank.

Shapes as in `encoded_context.py`. How many tokens a tail has, its sequence knows: what lies behind them is
forgotten, and written over by the tokens that follow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import KvPiece
from megatron_star.algorithm.recent_kv import RecentTail
from megatron_star.attention.kv_layout import KeyValue, empty_kv
from megatron_star.planning.kv_memory import tail_capacity
from megatron_star.planning.layer_mask import LayerMask


class LayerKind(NamedTuple):
    """The layers of a model that have the same mask, by their numbers; None is that of the plan."""

    mask: LayerMask | None
    layers: tuple[int, ...]


class Tail:
    """Query and generated tokens of one sequence, on its tail rank.

    It begins in its context's spare capacity, if no other does, and is copied out of it when that is full.
    Then it grows in chunks.
    """

    def __init__(self, context: EncodedContext) -> None:
        self.context = context
        self._layers: dict[int, KeyValue] = {}
        self._contiguous: set[int] = set()
        self._recent: dict[int, RecentTail] = {}
        self._has_spare: bool | None = None
        self._addresses: dict[LayerMask | None, np.ndarray] = {}

    def append(self, layer_number: int, start: int, key: Tensor, value: Tensor) -> KeyValue:
        """Put [tokens, 1, ng, hn] of a layer behind its first `start` tokens.

        Returns:
            Views of all of the layer's tokens.
        """
        if layer_number not in self._layers:
            self._begin(layer_number)
        end = start + key.size(0)
        if layer_number not in self._layers or end > self._layers[layer_number][0].size(0):
            self._grow(layer_number, start, end, (key, value))
        keys, values = self._layers[layer_number]
        keys[start:end], values[start:end] = key, value
        return keys[:end], values[:end]

    def append_recent(
        self, layer_number: int, mask: LayerMask, start: int, key: Tensor, value: Tensor
    ) -> KvPiece:
        """The same in a layer with this mask. Returns all of the tail that these tokens see."""
        tail_start = self.context.plan.num_tokens
        if layer_number not in self._recent:
            self._recent[layer_number] = RecentTail(mask, tail_start)
        self._addresses.clear()  # the buffer may be another one now
        return self._recent[layer_number].append(tail_start + start, key, value)

    def is_contiguous(self, layer_number: int) -> bool:
        """Whether a layer's tokens are contiguous with the context's in memory: all or none."""
        return layer_number in self._contiguous

    def _begin(self, layer_number: int) -> None:
        if self._has_spare is None:
            self._has_spare = self.context.reserve_spare(self)
        if self._has_spare:
            self._layers[layer_number] = self.context.spare(layer_number)
            self._contiguous.add(layer_number)
        self._addresses.clear()

    def _grow(self, layer_number: int, used: int, num_tokens: int, like: KeyValue) -> None:
        grown = tuple(empty_kv(tail_capacity(num_tokens), each) for each in like)
        if used:
            for new, old in zip(grown, self._layers[layer_number], strict=True):
                new[:used] = old[:used]
        self._layers[layer_number] = grown
        self._contiguous.discard(layer_number)
        self._addresses.clear()

    def make_room(self, kinds: Sequence[LayerKind], start: int, num_tokens: int) -> None:
        """In all layers, behind the first `start` tokens, so that others can write there (`addresses`).

        All layers have these tokens, so all of a kind have the same room.
        """
        for kind in kinds:
            if start + num_tokens <= self.end_of_buffer(kind):
                continue
            self._addresses.pop(kind.mask, None)
            for number in kind.layers:
                if kind.mask is None:
                    self._grow(number, start, start + num_tokens, self._layers[number])
                else:
                    self._recent[number].make_room(self.context.plan.num_tokens + start, num_tokens)

    def start_of_buffer(self, kind: LayerKind) -> int:
        """The token of the tail that the buffers of these layers begin with."""
        if kind.mask is None:
            return 0
        return self._recent[kind.layers[0]].first - self.context.plan.num_tokens

    def end_of_buffer(self, kind: LayerKind) -> int:
        """The token of the tail behind the last for which these layers have room."""
        number = kind.layers[0]
        keys, _ = self._layers[number] if kind.mask is None else self._recent[number].buffer
        return self.start_of_buffer(kind) + keys.size(0)

    def addresses(self, kind: LayerKind) -> np.ndarray:
        """[layers, 2], int64: where the buffers of keys and of values of these layers begin."""
        if kind.mask not in self._addresses:
            buffers = [
                self._layers[number] if kind.mask is None else self._recent[number].buffer
                for number in kind.layers
            ]
            self._addresses[kind.mask] = np.array([addresses_of(each) for each in buffers], dtype=np.int64)
        return self._addresses[kind.mask]

    @property
    def num_bytes(self) -> int:
        """Memory of its own, including what it may grow into."""
        own = (key_value for layer, key_value in self._layers.items() if layer not in self._contiguous)
        recent = sum(tail.num_bytes for tail in self._recent.values())
        return recent + sum(key.nbytes + value.nbytes for key, value in own)


def addresses_of(key_value: KeyValue) -> list[int]:
    """Of token 0 of the key and of the value, whose tokens lie as `attention/triton_tails.py` reads them."""
    for each in key_value:
        assert each.size(0) == 0 or each.is_contiguous()
    return [each.data_ptr() for each in key_value]
