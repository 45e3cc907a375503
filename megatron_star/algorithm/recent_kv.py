"""What a layer with a mask of its own keeps: only as far as what comes later can see.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_star.algorithm.kv_pieces import KvPiece, joined, pieces_within
from megatron_star.attention.kv_layout import empty_kv
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
    follow after `rewind`.
    """

    def __init__(self, mask: LayerMask, start: int) -> None:
        """start: position of the tail's first token."""
        self.mask, self.start, self.end = mask, start, start
        self._first = start  # position of the buffer's first token
        self._buffer: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> KvPiece:
        """Add [tokens, 1, ng, hn]. Returns all of the tail that these tokens see, themselves included."""
        first_seen = max(self.start, self.mask.first_seen(self.end))
        new = KvPiece(self.end, self.end + key.size(0), key, value)
        if key.size(0) > 1:  # of many tokens, not all need ever be stored
            seen = joined([*self._stored(first_seen), new])
            kept = [*self._stored(self._kept_from(new.end)), new]
            self.end = new.end
            self._begin_buffer(pieces_within(kept, self._kept_from(self.end), self.end), like=new)
            return seen
        if self._buffer is None or self.end - self._first == self._buffer[0].size(0):
            self._begin_buffer(self._stored(self._kept_from(self.end)), like=new, num_new=1)
        row = self.end - self._first
        self._buffer[0][row], self._buffer[1][row] = key[0], value[0]
        self.end = new.end
        return self._stored(first_seen)[0]

    def rewind(self, end: int) -> None:
        """Forget the tokens from this position on: of those appended last, `MOST_PROPOSED_TOKENS` at most."""
        assert self.end - MOST_PROPOSED_TOKENS <= end <= self.end
        self.end = end

    def _kept_from(self, end: int) -> int:
        """The first token that is kept of those before `end`."""
        seen_from = self.mask.kept_from(max(self.start, end - MOST_PROPOSED_TOKENS))
        return max(self.start, self._first, seen_from)

    def _stored(self, first: int) -> list[KvPiece]:
        """Views of the tokens from this position on; nothing if there are none."""
        if self._buffer is None or first >= self.end:
            return []
        return [
            KvPiece(self._first, self._first + self._buffer[0].size(0), *self._buffer).cut(first, self.end)
        ]

    def _begin_buffer(self, kept: list[KvPiece], like: KvPiece, num_new: int = 0) -> None:
        """With what is kept, and room for so many new tokens or more."""
        num_kept = sum(piece.end - piece.start for piece in kept)
        capacity = recent_tail_capacity(num_kept + num_new, self.mask)
        keys, values = (empty_kv(capacity, tensor) for tensor in like[2:])
        offset = 0
        for start, end, key, value in kept:
            rows = slice(offset, offset + end - start)
            keys[rows], values[rows] = key, value
            offset = rows.stop
        self._first, self._buffer = self.end - num_kept, (keys, values)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffer."""
        return sum(tensor.nbytes for tensor in self._buffer or ())
