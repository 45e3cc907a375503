"""Keys and values of one layer of a context as they are stored, and how rows attend to them.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size of keys, hv of values.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from megatron_star.attention.distinct_keys import of_heads
from megatron_star.attention.kv_layout import KeyValue, empty_kv
from megatron_star.attention.running import RunningAttention
from megatron_star.planning.kv_memory import spare_capacity


class HeldKv(Protocol):
    """Stored tokens that rows attend to."""

    def add_to(self, attention: RunningAttention, rows: Iterable[tuple[int, int]]) -> None:
        """Each of these ranges of rows sees all of these tokens."""


class StoredKv(Protocol):
    """Storage for so many tokens, filled piece by piece."""

    num_bytes: int
    """Memory that it takes."""

    def write(self, first_row: int, key: Tensor, value: Tensor) -> None:
        """Keep [tokens, 1, ng, hn] and [tokens, 1, ng, hv] in consecutive rows."""

    def keep_exact(self, first_row: int, key: Tensor, value: Tensor) -> None:
        """Until `forget_exact`, let `read` and `read_of_heads` find what was written as it was computed."""

    def forget_exact(self) -> None:
        """From now on they find what is stored."""

    def read(self, rows: slice) -> KeyValue:
        """Keys and values as they were computed, or nearly."""

    def read_of_heads(self, rows: Tensor) -> KeyValue:
        """Of each KV head its own rows, [n, ng]: [n, 1, ng, hn] and [n, 1, ng, hv]."""

    def held(self, num_rows: int) -> HeldKv:
        """The first so many rows."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored: tokens first."""


class KvFormat(Protocol):
    """How a context's keys and values are stored.

    Attributes:
        name: of `KV_DTYPES`.
    """

    name: str

    def spare_capacity(self, num_tokens: int) -> int:
        """Tokens that there is room for after so many, as they are computed."""

    def empty(self, num_tokens: int, like: KeyValue) -> StoredKv:
        """Storage for so many tokens of a layer."""


class ComputedPiece(NamedTuple):
    """Keys and values as they were computed: a `HeldKv`."""

    key: Tensor
    value: Tensor

    def add_to(self, attention: RunningAttention, rows: Iterable[tuple[int, int]]) -> None:
        """See `HeldKv`."""
        attention.add(rows, self.key, self.value)


class ComputedKv(NamedTuple):
    """Keys and values are stored as they are computed: a `StoredKv`."""

    key: Tensor
    value: Tensor

    @classmethod
    def empty(cls, num_tokens: int, like: KeyValue) -> Self:
        """For so many tokens."""
        return cls(*(empty_kv(num_tokens, each) for each in like))

    @property
    def num_bytes(self) -> int:
        """See `StoredKv`."""
        return self.key.nbytes + self.value.nbytes

    def write(self, first_row: int, key: Tensor, value: Tensor) -> None:
        """See `StoredKv`."""
        self.key[first_row : first_row + key.size(0)] = key
        self.value[first_row : first_row + value.size(0)] = value

    def keep_exact(self, first_row: int, key: Tensor, value: Tensor) -> None:
        """See `StoredKv`: nothing is lost."""

    def forget_exact(self) -> None:
        """See `StoredKv`."""

    def read(self, rows: slice) -> KeyValue:
        """See `StoredKv`: views."""
        return self.key[rows], self.value[rows]

    def read_of_heads(self, rows: Tensor) -> KeyValue:
        """See `StoredKv`."""
        return of_heads(self.key, rows), of_heads(self.value, rows)

    def held(self, num_rows: int) -> ComputedPiece:
        """See `StoredKv`: views."""
        return ComputedPiece(self.key[:num_rows], self.value[:num_rows])

    def tensors(self) -> tuple[Tensor, ...]:
        """See `StoredKv`."""
        return tuple(self)


@dataclass(frozen=True)
class ComputedFormat:
    """As they are computed: a `KvFormat`."""

    name: str = "auto"

    def spare_capacity(self, num_tokens: int) -> int:
        """See `KvFormat`."""
        return spare_capacity(num_tokens)

    def empty(self, num_tokens: int, like: KeyValue) -> ComputedKv:
        """See `KvFormat`."""
        return ComputedKv.empty(num_tokens, like)


AS_COMPUTED = ComputedFormat()
