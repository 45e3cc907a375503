"""Keys and values of a context in 8 bits, with one scale for each token and KV head.

Before it is rounded, each head is multiplied by an orthogonal matrix of which no value stands out
(`rotation`; QuaRot, arXiv 2404.00456, section 4). So an outlier of one channel is spread over all of them,
and one scale serves all values of a token. Products do not change where queries are multiplied by it as well,
and results are multiplied back. docs/journal.md, "KV in 8 bits", has what other scales lose.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size of keys, hv of values.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron_star.attention.distinct_keys import of_heads
from megatron_star.attention.kv_layout import KeyValue, empty_kv
from megatron_star.attention.partial import Partial
from megatron_star.attention.running import RunningAttention

PIECE_BYTES = 1 << 23
"""Of keys, or of values, in float32, that are widened at a time for a kernel that takes no others."""

AttendQuantised = Callable[[Tensor, "QuantisedTensor", "QuantisedTensor", float, torch.dtype], Partial]
"""Rotated query [sq, 1, np, hn] in float32, keys, values, factor on the scores, and the dtype in which
products may be taken: every row sees every key. The result is in float32, and rotated as the values are."""


@cache
def rotation(size: int, device: torch.device) -> Tensor:
    """[size, size], float32: the discrete Hartley transform, symmetric and its own inverse."""
    place = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / size * (place[:, None] * place % size)
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).to(device, torch.float32)


def rotated(tensor: Tensor) -> Tensor:
    """Of [.., size], in float32. Doing it twice changes nothing."""
    return tensor.to(torch.float32) @ rotation(tensor.size(-1), tensor.device)


class QuantisedTensor(NamedTuple):
    """Keys, or values, of consecutive tokens.

    Attributes:
        numbers: [tokens, 1, ng, size], int8 or float8_e4m3fn: rotated, and divided by the scales.
        scales: [tokens, 1, ng, 1], float32.
    """

    numbers: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, num_tokens: int, like: Tensor, dtype: torch.dtype) -> Self:
        """Uninitialised, for `like`, [.., 1, ng, size]."""
        numbers = like.new_empty((0, *like.shape[1:]), dtype=dtype)
        scales = like.new_empty((0, *like.shape[1:-1], 1), dtype=torch.float32)
        return cls(empty_kv(num_tokens, numbers), empty_kv(num_tokens, scales))

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return self.numbers.nbytes + self.scales.nbytes

    def rows(self, rows: slice) -> Self:
        """Views."""
        return type(self)(self.numbers[rows], self.scales[rows])

    def of_heads(self, rows: Tensor) -> Self:
        """Of each KV head its own rows, [n, ng]."""
        # Torch gathers no float8.
        numbers = of_heads(self.numbers.view(torch.int8), rows).view(self.numbers.dtype)
        return type(self)(numbers, of_heads(self.scales, rows))

    def write(self, tensor: Tensor) -> None:
        """Round [tokens, 1, ng, size]. What is not finite is not when it is read, either."""
        values = rotated(tensor)
        scales = values.abs().amax(-1, keepdim=True) / largest_number(self.numbers.dtype)
        values = values / scales.clamp_min(torch.finfo(torch.float32).tiny)
        self.numbers.copy_(values if self.numbers.dtype.is_floating_point else values.round_())
        self.scales.copy_(scales)

    def widened(self) -> Tensor:
        """[tokens, 1, ng, size] in float32, rotated."""
        return self.numbers.to(torch.float32).mul_(self.scales)

    def read(self, dtype: torch.dtype) -> Tensor:
        """[tokens, 1, ng, size] as it was written, or nearly."""
        return rotated(self.widened()).to(dtype)


def largest_number(dtype: torch.dtype) -> float:
    """Of the numbers that are stored."""
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max


class QuantisedPiece(NamedTuple):
    """Stored tokens: a `HeldKv`."""

    key: QuantisedTensor
    value: QuantisedTensor
    format: "QuantisedFormat"

    def add_to(self, attention: RunningAttention, rows: Iterable[tuple[int, int]]) -> None:
        """See `HeldKv`."""
        heads_per_group = attention.query.size(2) // self.key.numbers.size(2)
        few, many = [], []
        for start, end in rows:
            is_few = self.format.attend and (end - start) * heads_per_group <= self.format.most_rows
            (few if is_few else many).append((start, end))
        for start, end in few:
            query, scale = attention.query[start:end], attention.softmax_scale
            part = self.format.attend(rotated(query), self.key, self.value, scale, query.dtype)
            attention.partials.add_rows(start, end, part._replace(out=rotated(part.out)))
        if many:
            self._add_widened(attention, many)

    def _add_widened(self, attention: RunningAttention, rows: list[tuple[int, int]]) -> None:
        """With the kernel for what was computed, in pieces of about `PIECE_BYTES`. All of it is rotated."""
        dtype = attention.query.dtype
        queries = [rotated(attention.query[start:end]).to(dtype) for start, end in rows]
        num_tokens, *sizes = self.key.numbers.shape
        size = max(1, PIECE_BYTES // (4 * math.prod(sizes)))
        for first in range(0, num_tokens, size):
            piece = slice(first, first + size)
            key, value = (each.rows(piece).widened().to(dtype) for each in (self.key, self.value))
            for (start, end), query in zip(rows, queries, strict=True):
                part = attention.attend(query, key, value, causal=False)
                attention.partials.add_rows(start, end, part._replace(out=rotated(part.out)))


class QuantisedKv:
    """Keys and values of a layer in 8 bits: a `StoredKv`."""

    def __init__(self, num_tokens: int, like: KeyValue, format: "QuantisedFormat") -> None:
        """For so many tokens."""
        self.key, self.value = (QuantisedTensor.empty(num_tokens, each, format.dtype) for each in like)
        self.format, self.computed_dtype = format, like[0].dtype
        self._exact: list[tuple[int, KeyValue]] = []

    @property
    def num_bytes(self) -> int:
        """See `StoredKv`."""
        return self.key.num_bytes + self.value.num_bytes

    def write(self, first_row: int, key: Tensor, value: Tensor) -> None:
        """See `StoredKv`."""
        rows = slice(first_row, first_row + key.size(0))
        self.key.rows(rows).write(key)
        self.value.rows(rows).write(value)

    def keep_exact(self, first_row: int, key: Tensor, value: Tensor) -> None:
        """See `StoredKv`."""
        self._exact.append((first_row, (key, value)))

    def forget_exact(self) -> None:
        """See `StoredKv`."""
        self._exact.clear()

    def read(self, rows: slice) -> KeyValue:
        """See `StoredKv`: views of what is kept exact, if that is all."""
        for first, exact in self._exact:
            if first <= rows.start and rows.stop <= first + exact[0].size(0):
                return tuple(each[rows.start - first : rows.stop - first] for each in exact)
        found = tuple(each.rows(rows).read(self.computed_dtype) for each in (self.key, self.value))
        for first, exact in self._exact:
            start, end = max(first, rows.start), min(first + exact[0].size(0), rows.stop)
            if start < end:
                for to, each in zip(found, exact, strict=True):
                    to[start - rows.start : end - rows.start] = each[start - first : end - first]
        return found

    def read_of_heads(self, rows: Tensor) -> KeyValue:
        """See `StoredKv`."""
        found = [each.of_heads(rows).read(self.computed_dtype) for each in (self.key, self.value)]
        for first, exact in self._exact:
            num_rows = exact[0].size(0)
            is_here = ((first <= rows) & (rows < first + num_rows))[:, None, :, None]
            places = (rows - first).clamp(0, num_rows - 1)
            found = [torch.where(is_here, of_heads(e, places), f) for e, f in zip(exact, found, strict=True)]
        return tuple(found)

    def held(self, num_rows: int) -> QuantisedPiece:
        """See `StoredKv`: views."""
        rows = slice(num_rows)
        return QuantisedPiece(self.key.rows(rows), self.value.rows(rows), self.format)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `StoredKv`."""
        return *self.key, *self.value


@dataclass(frozen=True)
class QuantisedFormat:
    """In 8 bits: a `KvFormat`.

    Attributes:
        dtype: of the numbers.
        attend: reads them as they are; None where only a kernel for what was computed is there.
        most_rows: of one call of `attend`, times the query heads of a KV head. For more rows, and without
            `attend`, keys and values are widened in pieces.
    """

    name: str
    dtype: torch.dtype
    attend: AttendQuantised | None = None
    most_rows: int = 0

    def spare_capacity(self, num_tokens: int) -> int:
        """See `KvFormat`: tails are not in 8 bits."""
        return 0

    def empty(self, num_tokens: int, like: KeyValue) -> QuantisedKv:
        """See `KvFormat`."""
        return QuantisedKv(num_tokens, like, self)
