"""What crosses CP ranks: the KV of sources while a context is encoded, and partial results afterwards."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_star.attention.kv_layout import KeyValue, empty_message
from megatron_star.attention.merge import merge_outs
from megatron_star.attention.partial import Partial
from megatron_star.parallel.all_gather import all_gather_single
from megatron_star.planning.plan import Source


class SmallGather(Protocol):
    """Another way than a collective for tensors that it can take."""

    def takes(self, tensor: Tensor) -> bool:
        """The same on every rank for tensors of the same shape; nothing is sent."""

    def all_gather(self, mine: Tensor) -> Tensor:
        """As `Exchange.all_gather`."""


class Exchange:
    """The collectives of one CP group. Every rank of the group calls the same methods in the same order.

    Attributes:
        counts: calls and bytes so far, as `broadcasts`, `broadcast_bytes` (what this rank sent as the owner),
            `passes` and `pass_bytes`, `merges` and `merge_bytes`, `gathers` and `gather_bytes`, `sums` and
            `sum_bytes` (what this rank contributed to passed keys, to partial results, to columns of a
            product, and to sums of partial products).
        small: what the tensors that it takes go through, on all ranks; attached from above, if at all.
    """

    def __init__(self, cp_group: dist.ProcessGroup) -> None:
        self.cp_group = cp_group
        self.cp_rank: int = cp_group.rank()
        self.cp_size: int = cp_group.size()
        self.counts: Counter[str] = Counter()
        self.small: SmallGather | None = None

    def broadcast_sources(
        self, sources: Sequence[Source], read: Callable[[Source], KeyValue], like: KeyValue
    ) -> "SourceTransfers":
        """Start to send these sources, each from its owner to all ranks, in this order.

        Args:
            read: the owner's stored key and value of a source, [tokens, 1, ng, hn] each.
            like: any key and value [.., 1, ng, hn] of the same dtype and device.
        """
        return SourceTransfers(self, sources, read, like)

    def merge(self, part: Partial) -> Partial:
        """This rank's float32 partial, [1, np, sq, hn] and [1, np, sq], merged with those of all ranks.

        One collective.
        """
        return part if self.cp_size == 1 else merge_gathered(self.gather_partials(part))

    def gather_partials(self, part: Partial) -> Tensor:
        """`all_gather` of outputs with their LSE behind: [cp_size, 1, np, sq, hn + 1]."""
        mine = torch.cat((part.out, part.softmax_lse.unsqueeze(-1)), dim=-1)
        return mine.unsqueeze(0) if self.cp_size == 1 else self.all_gather(mine, "merge")

    def gather(self, mine: Tensor) -> Tensor:
        """`all_gather` of columns of a product."""
        return self.all_gather(mine, "gather")

    def all_gather(self, mine: Tensor, kind: str) -> Tensor:
        """[cp_size, *mine.shape]: the tensors of all ranks, which have the same shape.

        To be read before the next exchange, and not to be changed: it may be memory that the ranks share.
        """
        self.count(kind, mine)
        if self.is_small(mine):
            return self.small.all_gather(mine)
        mine = mine.contiguous()
        everyone = mine.new_empty(self.cp_size, *mine.shape)
        all_gather_single(everyone.view(-1), mine.view(-1), group=self.cp_group)
        return everyone

    def start_gather(self, mine: Tensor, kind: str) -> Callable[[], Tensor]:
        """`all_gather` of a tensor that goes its way while other things are done: call for the result."""
        mine = mine.contiguous()
        if self.cp_size == 1:
            return lambda: mine.unsqueeze(0)
        self.count(kind, mine)
        everyone = mine.new_empty(self.cp_size, *mine.shape)
        work = all_gather_single(everyone.view(-1), mine.view(-1), group=self.cp_group, async_op=True)

        def receive() -> Tensor:
            work.wait()
            return everyone

        return receive

    def add_up(self, mine: Tensor) -> Tensor:
        """The sum over the ranks of tensors of the same shape; the same bits on every rank."""
        if self.is_small(mine):
            return self.all_gather(mine, "sum").sum(0)
        self.count("sum", mine)
        dist.all_reduce(mine, group=self.cp_group)
        return mine

    def count(self, kind: str, sent: Tensor) -> None:
        """Note a message of this kind: broadcast, pass, merge, gather or sum."""
        self.counts[f"{kind}es" if kind == "pass" else f"{kind}s"] += 1
        self.counts[kind + "_bytes"] += sent.nbytes

    def slowest(self, seconds: Tensor) -> list[float]:
        """Of each of these durations, [n] on the group's device, the longest on any rank."""
        longest = seconds.clone()
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.cp_group)
        return longest.tolist()

    def is_small(self, tensor: Tensor) -> bool:
        """Whether a tensor goes through `small`."""
        return self.small is not None and self.small.takes(tensor)


def merge_gathered(everyone: Tensor) -> Partial:
    """What `Exchange.gather_partials` gives, merged; of a rank that is alone, as it is."""
    outs, lses = everyone[..., :-1], everyone[..., -1]
    if everyone.size(0) == 1:
        return Partial(outs[0], lses[0])
    return Partial(merge_outs(outs, lses), lses.logsumexp(0))


class SourceTransfers:
    """Sources on their way: while one is being used, the next one is in flight."""

    def __init__(
        self,
        exchange: Exchange,
        sources: Sequence[Source],
        read: Callable[[Source], KeyValue],
        like: KeyValue,
    ) -> None:
        self.exchange, self.read, self.like = exchange, read, like
        self.waiting = deque(sources)
        self.in_flight: deque[tuple[dist.Work, Tensor, KeyValue]] = deque()
        self._start_next()

    def receive(self) -> KeyValue:
        """Key and value [tokens, 1, ng, hn] of the next source, in the order given at the start."""
        work, _, key_value = self.in_flight.popleft()
        work.wait()
        self._start_next()
        return key_value

    def _start_next(self) -> None:
        if not self.waiting:
            return
        source = self.waiting.popleft()
        group = self.exchange.cp_group
        message, key_value = empty_message(source.end - source.start, self.like)
        if source.owner == self.exchange.cp_rank:
            for part, stored in zip(key_value, self.read(source), strict=True):
                part.copy_(stored)
            self.exchange.count("broadcast", message)
        work = dist.broadcast(message, group=group, group_src=source.owner, async_op=True)
        self.in_flight.append((work, message, key_value))
