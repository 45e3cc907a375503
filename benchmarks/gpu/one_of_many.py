"""The work of one CP rank of many, on one GPU: what would arrive from the others is made up, nothing is sent.

The time of a rank does not depend on values. What is left out is the broadcasts, whose bytes are counted, and
the gathers.
"""

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_star.attention.kv_layout import KeyValue, empty_message
from megatron_star.parallel.exchange import Exchange
from megatron_star.planning.plan import Source


class OneOfMany(Exchange):
    """The exchange of rank `cp_rank` of `cp_size`, without the others.

    Attributes:
        received_bytes: what other ranks would have sent.
    """

    def __init__(self, cp_rank: int, cp_size: int) -> None:
        super().__init__(_Place(cp_rank, cp_size))
        self.received_bytes = 0
        self._made_up: KeyValue | None = None

    def broadcast_sources(
        self, sources: Sequence[Source], read: Callable[[Source], KeyValue], like: KeyValue
    ) -> "_MadeUp":
        """See `Exchange`; an owner copies what it would send."""
        return _MadeUp(self, sources, read, like)

    def all_gather(self, mine: Tensor, kind: str) -> Tensor:
        """See `Exchange`; all ranks have what this one has."""
        self.count(kind, mine)
        return mine.expand(self.cp_size, *mine.shape).contiguous()

    def start_gather(self, mine: Tensor, kind: str) -> Callable[[], Tensor]:
        """See `Exchange`; all ranks have what this one has."""
        everyone = self.all_gather(mine, kind)
        self.received_bytes += everyone.nbytes - mine.nbytes
        return lambda: everyone

    def add_up(self, mine: Tensor) -> Tensor:
        """See `Exchange`; the others add nothing."""
        self.count("sum", mine)
        return mine

    def made_up(self, num_tokens: int, like: KeyValue) -> KeyValue:
        """Random key and value [num_tokens, 1, ng, hn], the same memory each time."""
        if self._made_up is None or self._made_up[0].size(0) < num_tokens:
            message, self._made_up = empty_message(num_tokens, like)
            message.normal_()
        key, value = self._made_up
        return key[:num_tokens], value[:num_tokens]


class _Place:
    """A rank's place in a group that does not exist."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


class _MadeUp:
    """As `SourceTransfers`, of sources that nobody sends."""

    def __init__(
        self,
        exchange: OneOfMany,
        sources: Sequence[Source],
        read: Callable[[Source], KeyValue],
        like: KeyValue,
    ) -> None:
        self.exchange, self.read, self.like = exchange, read, like
        self.waiting = deque(sources)

    def receive(self) -> KeyValue:
        """Key and value [tokens, 1, ng, hn] of the next source."""
        source = self.waiting.popleft()
        if source.owner == self.exchange.cp_rank:
            message, key_value = empty_message(source.end - source.start, self.like)
            for part, stored in zip(key_value, self.read(source), strict=True):
                part.copy_(stored)
            self.exchange.count("broadcast", message)
        else:
            key_value = self.exchange.made_up(source.end - source.start, self.like)
            self.exchange.received_bytes += sum(part.nbytes for part in key_value)
        return key_value
