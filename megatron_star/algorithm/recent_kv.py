"""What a layer with a mask of its own keeps: only as far as what comes later can see.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_star.algorithm.kv_pieces import KvPiece, joined, pieces_within
from megatron_star.attention.kv_layout import KeyValue, empty_kv
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS, recent_tail_capacity
from megatron_star.planning.layer_mask import LayerMask


def copied(pieces: Sequence[KvPiece]) -> list[KvPiece]:
    """The same in storage of its own, all pieces side by side: what they are views of can be freed."""
    num_tokens = sum(piece.end - piece.start for piece in pieces)
    copies, offset = [], 0
    if pieces:
        keys, values = (empty_kv(num_tokens, like) for like in pieces[0][2:])
    for start, end, key, value in pieces:
        rows = slice(offset, offset + end - start)
        keys[rows], values[rows] = key, value
        copies.append(KvPiece(start, end, keys[rows], values[rows]))
        offset = rows.stop
    return copies


class RecentTail:
    """The end of one sequence's tail in one layer.

    It grows in a buffer; when that is full, what can still be seen is moved to a new one, also by tokens that
    follow after the tail has forgotten its end.

    Attributes:
        first: position of the buffer's first token.
        buffer: keys and values.
    """

    def __init__(self, mask: LayerMask, start: int) -> None:
        """start: position of the tail's first token."""
        self.mask, self.start = mask, start
        self.first = start
        self.buffer: KeyValue | None = None

    def append(self, position: int, key: Tensor, value: Tensor) -> KvPiece:
        """Add [tokens, 1, ng, hn] from this position on.

        It follows those appended before, or the last of them are forgotten, `MOST_PROPOSED_TOKENS` at most.

        Returns:
            All of the tail that these tokens see, themselves included.
        """
        first_seen = max(self.start, self.mask.first_seen(position))
        assert self.first <= first_seen
        new = KvPiece(position, position + key.size(0), key, value)
        if key.size(0) > 1 + MOST_PROPOSED_TOKENS:  # of many tokens, not all need ever be stored
            seen = joined([*self._stored(first_seen, position), new])
            kept = [*self._stored(self._kept_from(new.end), position), new]
            self._begin_buffer(pieces_within(kept, self._kept_from(new.end), new.end), new.end, like=new[2:])
            return seen
        self.make_room(position, key.size(0), like=new[2:])
        rows = slice(position - self.first, new.end - self.first)
        self.buffer[0][rows], self.buffer[1][rows] = key, value
        return self._stored(first_seen, new.end)[0]

    def make_room(self, position: int, num_tokens: int, like: KeyValue | None = None) -> None:
        """For so many tokens from this position on.

        like: key and value [.., 1, ng, hn]; needed before the first tokens.
        """
        if self.buffer is None or position + num_tokens - self.first > self.buffer[0].size(0):
            kept = self._stored(self._kept_from(position), position)
            self._begin_buffer(kept, position, like=like or self.buffer, num_new=num_tokens)

    def _kept_from(self, end: int) -> int:
        """The first token that is kept of those before `end`."""
        seen_from = self.mask.kept_from(max(self.start, end - MOST_PROPOSED_TOKENS))
        return max(self.start, self.first, seen_from)

    def _stored(self, first: int, end: int) -> list[KvPiece]:
        """Views of the tokens at these positions; nothing if there are none."""
        if self.buffer is None or first >= end:
            return []
        return [KvPiece(self.first, self.first + self.buffer[0].size(0), *self.buffer).cut(first, end)]

    def _begin_buffer(self, kept: list[KvPiece], end: int, like: KeyValue, num_new: int = 0) -> None:
        """With what is kept of the tokens before `end`, and room for so many new tokens or more."""
        num_kept = sum(piece.end - piece.start for piece in kept)
        capacity = recent_tail_capacity(num_kept + num_new, self.mask)
        keys, values = (empty_kv(capacity, tensor) for tensor in like)
        offset = 0
        for start, stop, key, value in kept:
            rows = slice(offset, offset + stop - start)
            keys[rows], values[rows] = key, value
            offset = rows.stop
        self.first, self.buffer = end - num_kept, (keys, values)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffer."""
        return sum(tensor.nbytes for tensor in self.buffer or ())
