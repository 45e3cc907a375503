"""Passed keys: what a block names of its keys, and what later blocks see of them.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size. Each head names keys of its own.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import KvPiece, whole
from megatron_star.attention.distinct_keys import most_distinct, of_heads
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.parallel.exchange import Exchange
from megatron_star.planning.passing import Named, wave_passing
from megatron_star.planning.segment import Segment, Wave


class PassedKeys:
    """The named keys of one wave, layer by layer: `start`, and then `receive`, on all ranks.

    Attributes:
        reads_first: what is named depends on KV that other ranks send.
    """

    def __init__(self, context: EncodedContext, wave: Wave, exchange: Exchange, device: torch.device) -> None:
        self.context, self.exchange, self.device = context, exchange, device
        self.passing = wave_passing(context.plan, wave)
        self.reads_first = self.passing.reads_first
        own = (segment for segment in wave if segment.owner == exchange.cp_rank)
        self._seen = [self._rows_seen(segment) for segment in own]
        self._receive: Callable[[], Tensor] | None = None
        self._head_sizes = 0, 0

    def start(self, layer_number: int, like: KeyValue, received: Iterable[KvPiece] = ()) -> None:
        """Name the keys of blocks that end in this wave, and send what the wave sees of all blocks.

        Args:
            like: a key of the layer, and a value.
            received: what other ranks sent of these blocks.
        """
        for named in self.passing.named:
            if named.owner == self.exchange.cp_rank:
                self._name(layer_number, named, received)
        if self.passing.sent:
            self._receive = self.exchange.start_gather(self._sent(layer_number, like), "pass")

    def receive(self) -> list[KeyValue | None]:
        """What each segment of this rank sees, [passed, 1, ng, hn] each; None for one that sees nothing."""
        everyone = self._receive().flatten(0, 1) if self._receive else None
        self._receive = None
        return [self._key_value(everyone, rows) for rows in self._seen]

    def _key_value(self, everyone: Tensor | None, rows: Tensor | None) -> KeyValue | None:
        return None if rows is None else everyone.index_select(0, rows).split(self._head_sizes, -1)

    def _name(self, layer_number: int, named: Named, received: Iterable[KvPiece]) -> None:
        """Name the keys of one block. They are copied only if this rank does not store all of it."""
        block = self._block(layer_number, named, received)
        positions = named_positions(block.key, named)
        if named.is_whole:
            self.context.keep_named_rows(layer_number, named.block, positions)
        else:
            copies = of_heads(block.key, positions), of_heads(block.value, positions)
            self.context.keep_named(layer_number, named.block, positions, copies)

    def _block(self, layer_number: int, named: Named, received: Iterable[KvPiece]) -> KvPiece:
        """All of a block."""
        stored = [
            KvPiece(source.start, source.end, *self.context.read(layer_number, source))
            for source in self.context.plan.owners_of(named.tokens)
            if source.owner == self.exchange.cp_rank
        ]
        return whole([*stored, *received], *named.tokens)

    def _sent(self, layer_number: int, like: KeyValue) -> Tensor:
        """[num_padded, 1, ng, hn + hv]: each key and its value; nobody reads what lies behind this rank's."""
        key, value = like
        self._head_sizes = key.size(-1), value.size(-1)
        mine = key.new_empty(self.passing.num_padded, *key.shape[1:-1], sum(self._head_sizes))
        for sent in self.passing.sent:
            if sent.owner == self.exchange.cp_rank:
                named = self.context.named(layer_number, sent.block, sent.num_keys)
                torch.cat(named, -1, out=mine[sent.row : sent.row + sent.num_keys])
        return mine

    def _rows_seen(self, segment: Segment) -> Tensor | None:
        """Rows among what is gathered, [cp_size, num_padded] in one dimension; None if it sees none."""
        num_padded = self.passing.num_padded
        ranges = [torch.arange(*rows) + owner * num_padded for owner, rows in self.passing.rows(segment)]
        return torch.cat(ranges).to(self.device) if ranges else None


def named_positions(key: Tensor, named: Named) -> Tensor:
    """[named, ng], int64: which keys [tokens, 1, ng, hn] of a block it names; what goes farthest first."""
    num_anchor_keys = named.num_anchor_keys
    distinct = most_distinct(key, named.num_keys - num_anchor_keys, num_anchor_keys)
    anchor = torch.arange(num_anchor_keys, device=key.device)
    return torch.cat((anchor[:, None].expand(-1, key.size(2)), distinct))
