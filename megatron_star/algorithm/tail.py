"""Query and generated tokens of a sequence: their keys and values on its tail rank.

Shapes as in `encoded_context.py`.
"""

from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import KvPiece
from megatron_star.algorithm.recent_kv import RecentTail
from megatron_star.attention.kv_layout import KeyValue, empty_kv
from megatron_star.planning.kv_memory import tail_capacity
from megatron_star.planning.layer_mask import LayerMask


class Tail:
    """Query and generated tokens of one sequence, on its tail rank.

    It begins in its context's spare capacity, if no other does, and is copied out of it when that is full.
    Then it grows in chunks.
    """

    def __init__(self, context: EncodedContext) -> None:
        self.context = context
        self._layers: dict[int, KeyValue] = {}
        self._lengths: dict[int, int] = {}
        self._contiguous: set[int] = set()
        self._recent: dict[int, RecentTail] = {}
        self._has_spare: bool | None = None

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Add [tokens, 1, ng, hn] to a layer."""
        if layer_number not in self._layers:
            self._begin(layer_number)
        start = self._lengths.get(layer_number, 0)
        end = start + key.size(0)
        if layer_number not in self._layers or end > self._layers[layer_number][0].size(0):
            self._grow(layer_number, end, (key, value))
        keys, values = self._layers[layer_number]
        keys[start:end], values[start:end] = key, value
        self._lengths[layer_number] = end

    def append_recent(self, layer_number: int, mask: LayerMask, key: Tensor, value: Tensor) -> KvPiece:
        """Add [tokens, 1, ng, hn] to a layer with this mask. Returns all of the tail that they see."""
        if layer_number not in self._recent:
            self._recent[layer_number] = RecentTail(mask, self.context.plan.num_tokens)
        return self._recent[layer_number].append(key, value)

    def rewind(self, num_tokens: int) -> None:
        """Forget all tokens but the first so many; see `Sequence.rewind`."""
        self._lengths = {layer: min(length, num_tokens) for layer, length in self._lengths.items()}
        for recent in self._recent.values():
            recent.rewind(recent.start + num_tokens)

    def stored(self, layer_number: int) -> KeyValue:
        """Views of a layer's tail so far, [tokens, 1, ng, hn] each."""
        keys, values = self._layers[layer_number]
        end = self._lengths[layer_number]
        return keys[:end], values[:end]

    def num_contiguous(self, layer_number: int) -> int:
        """Tokens of a layer that are contiguous with the context's in memory: all or none."""
        return self._lengths[layer_number] if layer_number in self._contiguous else 0

    def _begin(self, layer_number: int) -> None:
        if self._has_spare is None:
            self._has_spare = self.context.reserve_spare(self)
        if self._has_spare:
            self._layers[layer_number] = self.context.spare(layer_number)
            self._contiguous.add(layer_number)

    def _grow(self, layer_number: int, num_tokens: int, like: KeyValue) -> None:
        grown = tuple(empty_kv(tail_capacity(num_tokens), each) for each in like)
        used = self._lengths.get(layer_number, 0)
        if used:
            for new, old in zip(grown, self._layers[layer_number], strict=True):
                new[:used] = old[:used]
        self._layers[layer_number] = grown
        self._contiguous.discard(layer_number)

    @property
    def num_bytes(self) -> int:
        """Memory of its own, including what it may grow into."""
        own = (key_value for layer, key_value in self._layers.items() if layer not in self._contiguous)
        recent = sum(tail.num_bytes for tail in self._recent.values())
        return recent + sum(key.nbytes + value.nbytes for key, value in own)
