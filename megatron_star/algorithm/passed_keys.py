"""Passed keys: what a block names of its keys, and what later blocks see of them.

Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size. Each head names keys of its own.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_star.algorithm.kv_pieces import KeyValue, KvPiece, whole
from megatron_star.algorithm.kv_store import EncodedContext
from megatron_star.attention.distinct_keys import most_distinct, of_heads
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

    def start(self, layer_number: int, like: Tensor, received: Iterable[KvPiece] = ()) -> None:
        """Name the keys of blocks that end in this wave, and send what the wave sees of all blocks.

        Args:
            like: a key of the layer.
            received: what other ranks sent of these blocks.
        """
        for named in self.passing.named:
            if named.owner == self.exchange.cp_rank:
                self._name(layer_number, named, received)
        if self.passing.sent:
            self._receive = self.exchange.start_gather(self._sent(layer_number, like), "pass")

    def receive(self) -> list[KeyValue | None]:
        """What each segment of this rank sees, [passed, 1, ng, hn] each; None for one that sees nothing."""
        everyone = self._receive().flatten(0, 2) if self._receive else None
        self._receive = None
        return [rows and tuple(everyone.index_select(0, each) for each in rows) for rows in self._seen]

    def _name(self, layer_number: int, named: Named, received: Iterable[KvPiece]) -> None:
        """Name the keys of one block. They are copied only if this rank does not store all of it."""
        block = self._block(layer_number, named, received)
        positions = named_positions(block.key, named)
        if named.is_whole:
            rows = positions + self.context.offset_of(named.tokens.start)
            self.context.keep_named_rows(layer_number, named.block, rows)
        else:
            copies = of_heads(block.key, positions), of_heads(block.value, positions)
            self.context.keep_named(layer_number, named.block, copies)

    def _block(self, layer_number: int, named: Named, received: Iterable[KvPiece]) -> KvPiece:
        """All of a block."""
        stored = [
            KvPiece(source.start, source.end, *self.context.read(layer_number, source))
            for source in self.context.plan.owners_of(named.tokens)
            if source.owner == self.exchange.cp_rank
        ]
        return whole([*stored, *received], *named.tokens)

    def _sent(self, layer_number: int, like: Tensor) -> Tensor:
        """[2, num_padded, 1, ng, hn]: keys and values; nobody reads what lies behind those of this rank."""
        mine = like.new_empty(2, self.passing.num_padded, *like.shape[1:])
        for sent in self.passing.sent:
            if sent.owner == self.exchange.cp_rank:
                named = self.context.named(layer_number, sent.block, sent.num_keys)
                for rows, each in zip(mine, named, strict=True):
                    rows[sent.row : sent.row + sent.num_keys] = each
        return mine

    def _rows_seen(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Rows of keys, and of values, among what is gathered: [cp_size, 2, num_padded] in one dimension."""
        num_padded = self.passing.num_padded
        ranges = [torch.arange(*rows) + 2 * owner * num_padded for owner, rows in self.passing.rows(segment)]
        if not ranges:
            return None
        keys = torch.cat(ranges).to(self.device)
        return keys, keys + num_padded


def named_positions(key: Tensor, named: Named) -> Tensor:
    """[named, ng], int64: which keys [tokens, 1, ng, hn] of a block it names; what goes farthest first."""
    num_anchor_keys = named.num_anchor_keys
    distinct = most_distinct(key, named.num_keys - num_anchor_keys, num_anchor_keys)
    anchor = torch.arange(num_anchor_keys, device=key.device)
    return torch.cat((anchor[:, None].expand(-1, key.size(2)), distinct))
