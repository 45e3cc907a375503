"""Who names keys in a wave of a plan, and what is sent of named keys for it: integers only.

The keys that a block names are known to whoever has all of the block's keys: the owner of its last segment,
which attends to the whole block. It keeps them, and sends them again for each wave that sees them.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_star.planning.mask import Range
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.segment import Segment, Wave


class Named(NamedTuple):
    """A block that ends in a wave, and the rank that names its keys.

    Attributes:
        is_whole: the owner stores all of it, and none of it in a context that this one extends.
        num_keys: that are named, of which `num_anchor_keys` are the context's first.
    """

    block: int
    tokens: Range
    owner: int
    is_whole: bool
    num_keys: int
    num_anchor_keys: int

    @property
    def num_copies(self) -> int:
        """Keys that the owner keeps copies of: it has those of a block that it stores."""
        return 0 if self.is_whole else self.num_keys


class Sent(NamedTuple):
    """The first so many of a block's named keys, which their owner sends to all ranks.

    `row`: of the first of them among those that its owner sends.
    """

    block: int
    owner: int
    num_keys: int
    row: int


@dataclass(frozen=True)
class WavePassing:
    """What one wave names, and what it sees of named keys.

    Attributes:
        named: by rising block.
        sent: by rising block; each once, as many of its keys as any segment of the wave sees.
    """

    plan: ContextPlan
    named: tuple[Named, ...]
    sent: tuple[Sent, ...]

    @property
    def reads_first(self) -> bool:
        """Whether a rank must read some of what it names keys of."""
        return not all(named.is_whole for named in self.named)

    @cached_property
    def num_padded(self) -> int:
        """Keys that each rank contributes to the all-gather: as many as the rank that sends most."""
        return max((sent.row + sent.num_keys for sent in self.sent), default=0)

    def rows(self, segment: Segment) -> Iterator[tuple[int, Range]]:
        """What a segment sees: the rank that sent it, and the rows there."""
        sent_of_block = {sent.block: sent for sent in self.sent}
        for block, num_keys in self.plan.mask.passed(segment.start):
            sent = sent_of_block[block]
            yield sent.owner, Range(sent.row, sent.row + num_keys)


def wave_passing(plan: ContextPlan, wave: Wave) -> WavePassing:
    """The same on every rank."""
    return WavePassing(plan, tuple(named_blocks(plan, wave)), tuple(_sent(plan, wave)))


def named_blocks(plan: ContextPlan, wave: Wave) -> Iterator[Named]:
    """The blocks that end in a wave, if they name keys."""
    edges = plan.mask.block_edges
    for segment in wave:
        block = bisect_left(edges, segment.end) - 1
        num_keys = plan.mask.num_named(block)
        if num_keys and segment.end == edges[block + 1]:
            tokens = Range(edges[block], segment.end)
            owners = {source.owner for source in plan.owners_of(tokens)}
            is_whole = tokens.start >= plan.start and owners == {segment.owner}
            num_anchor_keys = 0 if block else plan.mask.num_anchor_tokens(segment.end)
            yield Named(block, tokens, segment.owner, is_whole, num_keys, num_anchor_keys)


def _sent(plan: ContextPlan, wave: Wave) -> Iterator[Sent]:
    most: dict[int, int] = {}
    for segment in wave:
        for block, num_keys in plan.mask.passed(segment.start):
            most[block] = max(most.get(block, 0), num_keys)
    rows = [0] * plan.cp_size
    for block, num_keys in sorted(most.items()):
        end = plan.mask.block_edges[block + 1]
        (last,) = plan.owners_of(Range(end - 1, end))
        yield Sent(block, last.owner, num_keys, rows[last.owner])
        rows[last.owner] += num_keys
