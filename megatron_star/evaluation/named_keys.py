"""The keys that blocks would name, found in the KV that exact attention made.

A setting that passes keys names them in KV of its own, which differs a little behind the first layer. Here no
setting has run. Shapes: tokens first, then b = 1, ng KV heads of this TP rank, hn head size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.attention.distinct_keys import most_distinct, of_heads
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.parallel.exchange import Exchange
from megatron_star.planning.mask import Mask, Range


class NamingBlock(NamedTuple):
    """A block that names keys; the first so many of it, the anchor, are no choice of its own."""

    tokens: Range
    num_anchor_keys: int


class PassedToToken(NamedTuple):
    """What a mask passes to a probed token of a block, besides the anchor."""

    mask: int
    row: int
    block: NamingBlock
    num_keys: int


class NamedKeys:
    """For masks and probed tokens, the keys that each mask passes to each token.

    Attributes:
        num_masks: among them also those that pass nothing.
    """

    def __init__(
        self, exact: EncodedContext, exchange: Exchange, masks: Sequence[Mask], positions: Sequence[int]
    ) -> None:
        """exact: the context as exact attention encodes it, on every rank, with all of it kept."""
        self.exact, self.exchange, self.num_masks = exact, exchange, len(masks)
        self._passed = [
            passed
            for number, mask in enumerate(masks)
            for row, position in enumerate(positions)
            for passed in _passed_to(number, mask, row, position)
        ]
        self._most: dict[NamingBlock, int] = {}
        for passed in self._passed:
            self._most[passed.block] = max(passed.num_keys, self._most.get(passed.block, 0))

    def passed(self, layer_number: int, like: KeyValue) -> Iterator[tuple[int, int, KeyValue]]:
        """Number of the mask, row of the token, and the keys and values, [passed, 1, ng, hn] each, if any.

        On every rank the same, and all of it.

        Args:
            like: a key of the layer, and a value.
        """
        named = self._named(layer_number, like)
        seen: dict[tuple[int, int], list[KeyValue]] = {}
        for mask, row, block, num_keys in self._passed:
            first = tuple(each[:num_keys] for each in named[block])
            seen.setdefault((mask, row), []).append(first)
        for (mask, row), pieces in seen.items():
            yield mask, row, tuple(map(torch.cat, zip(*pieces, strict=True)))

    def _named(self, layer_number: int, like: KeyValue) -> dict[NamingBlock, KeyValue]:
        """As many keys of each block as any token sees, the most distinct first, with their values."""
        sources = [list(self.exact.plan.owners_of(block.tokens)) for block in self._most]
        transfers = self.exchange.broadcast_sources(
            [source for of_block in sources for source in of_block],
            lambda source: self.exact.read(layer_number, source),
            like=like,
        )
        named = {}
        for (block, num_keys), of_block in zip(self._most.items(), sources, strict=True):
            received = [transfers.receive() for _ in of_block]
            key, value = map(torch.cat, zip(*received, strict=True))
            positions = most_distinct(key, num_keys, block.num_anchor_keys)
            named[block] = of_heads(key, positions), of_heads(value, positions)
        return named


def _passed_to(number: int, mask: Mask, row: int, position: int) -> Iterator[PassedToToken]:
    for block, num_keys in mask.passed(position):
        tokens = Range(mask.block_edges[block], mask.block_edges[block + 1])
        num_anchor_keys = 0 if block else mask.num_anchor_tokens(position)
        if num_keys > num_anchor_keys:
            yield PassedToToken(number, row, NamingBlock(tokens, num_anchor_keys), num_keys - num_anchor_keys)
