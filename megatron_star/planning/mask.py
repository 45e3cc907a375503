"""Who sees what: the masks of a context, one class for each pattern.

A pattern is a class and its row in `MASKS`, under the name that `StarConfig.mode` has for it. The mask of a
context is made from the user's options, the number of tokens and the mask of the context that it extends.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Self

from megatron_star.config import StarConfig


class Range(NamedTuple):
    """[start, end) of context tokens, or of a forward pass's rows."""

    start: int
    end: int


class Passed(NamedTuple):
    """What a token sees of an earlier block besides ranges: the first so many of the keys that it names.

    A block names keys in each layer and KV head by itself, in an order of its own (`most_distinct`). So their
    number is known to a plan, and their positions are not.
    """

    block: int
    num_keys: int


@dataclass(frozen=True)
class Mask(ABC):
    """What tokens see of those before them. Within a block, a token sees all that come before it.

    Two contexts of the same tokens are encoded alike if their masks are equal. What a token sees depends on
    the block that it is in and on those before, and not on where its block ends: so contexts may be encoded
    alike up to a token (`shared_prefix.py`).

    Attributes:
        block_edges: from 0 to the number of tokens.
    """

    block_edges: tuple[int, ...]

    @abstractmethod
    def sources(self, start: int, end: int) -> tuple[Range, ...]:
        """What the tokens [start, end) of one block see before `start`: a few ranges, rising and apart."""

    @abstractmethod
    def prefix(self, num_tokens: int) -> "Mask":
        """The mask of the first so many tokens, as if they were the context; its last block may be cut."""

    def num_anchor_tokens(self, start: int) -> int:
        """Tokens at the beginning of the context that the block of this token sees though it is not near.

        They see nothing but each other, so whoever needs them may encode them again.
        """
        return 0

    def passed(self, start: int) -> tuple[Passed, ...]:
        """What the block of this token sees of keys that earlier blocks name, in the order of the blocks."""
        return ()

    def num_named(self, block: int) -> int:
        """How many keys this block names."""
        return 0

    def num_passed(self, start: int) -> int:
        """How many named keys the block of this token sees."""
        return sum(num_keys for _, num_keys in self.passed(start))

    def hidden(self, position: int) -> tuple[Range, ...]:
        """What the token at `position` does not see of those before it, unless it is named and passed."""
        anchor = Range(0, self.num_anchor_tokens(position))
        seen = joined_ranges([anchor, *self.sources(position, position + 1)])
        starts, ends = [0, *(r.end for r in seen)], [*(r.start for r in seen), position]
        return tuple(Range(*r) for r in zip(starts, ends, strict=True) if r[0] < r[1])

    @property
    def rule(self) -> tuple[Any, ...]:
        """All of it but where its blocks are."""
        others = (getattr(self, each.name) for each in fields(self) if each.name != "block_edges")
        return (type(self), *others)

    @property
    def num_tokens(self) -> int:
        """Of the context."""
        return self.block_edges[-1]

    @property
    def num_blocks(self) -> int:
        """0 for an empty context."""
        return len(self.block_edges) - 1

    def edges_to(self, num_tokens: int) -> tuple[int, ...]:
        """Block edges of the first so many tokens."""
        return (*self.block_edges[: bisect_left(self.block_edges, num_tokens)], num_tokens)

    def edges_within(self, start: int, end: int) -> tuple[int, ...]:
        """Block edges inside (start, end)."""
        first = bisect_right(self.block_edges, start)
        return self.block_edges[first : bisect_left(self.block_edges, end, first)]


class Pattern(Mask):
    """A mask that the user's options choose."""

    @classmethod
    @abstractmethod
    def of(cls, config: StarConfig, num_tokens: int, base: Mask | None = None) -> Mask:
        """The mask of a context of `num_tokens`, of which `base` is the mask of the beginning."""

    @staticmethod
    @abstractmethod
    def num_sources(config: StarConfig, num_tokens: int) -> int:
        """About how many ranges all blocks of such a context see together: known before anything is built."""


@dataclass(frozen=True)
class ExactMask(Pattern):
    """Every token sees all that come before it: one block."""

    @classmethod
    def of(cls, config: StarConfig, num_tokens: int, base: Mask | None = None) -> Self:
        """One block, whatever the base was: exact attention has no other."""
        return cls((0, num_tokens) if num_tokens else (0,))

    @staticmethod
    def num_sources(config: StarConfig, num_tokens: int) -> int:
        """One block sees itself."""
        return 1

    def sources(self, start: int, end: int) -> tuple[Range, ...]:
        """All."""
        return joined_ranges([Range(0, start)])

    def prefix(self, num_tokens: int) -> Self:
        """One block, too."""
        return type(self)(self.edges_to(num_tokens))


@dataclass(frozen=True)
class StarMask(Pattern):
    """Star Attention (arXiv 2411.17116, section 2.1): a token sees its block and the anchor.

    With `passed_keys`, it also sees keys of the blocks between. Each block names its most distinct keys, and
    passes fewer of them the farther they go: all to the first block that does not see it whole, half to the
    second, a quarter to the third and fourth, an eighth to the next four, and so on. So the number of keys
    that a block sees grows with the logarithm of the number of blocks. The anchor is then what the first
    block names before anything else, and passes to all.

    Attributes:
        anchor_size: tokens at the beginning that all blocks see; at most the first block.
        neighbor_blocks: blocks before its own that a token also sees.
        passed_keys: that a block names, if it has so many.
    """

    anchor_size: int
    neighbor_blocks: int = 0
    passed_keys: int = 0

    @classmethod
    def of(cls, config: StarConfig, num_tokens: int, base: Mask | None = None) -> Mask:
        """Blocks as even as can be, behind those of the base. A lone block hides nothing, so it is exact;
        but not if it names keys, which a context that extends it sees.
        """
        assert config.block_size is not None, "sizes are chosen before a mask is made"
        edges = _with_even_blocks(base.block_edges if base else (0,), num_tokens, config.block_size)
        anchor_size = config.block_size if config.anchor_size is None else config.anchor_size
        return cls(edges, anchor_size, config.neighbor_blocks, config.passed_keys or 0)._simplified()

    @staticmethod
    def num_sources(config: StarConfig, num_tokens: int) -> int:
        """Each block sees the anchor, or itself, its neighbors, and what is passed, of which 16 count as one:
        planning takes about as long for them.
        """
        assert config.block_size is not None, "sizes are chosen before a mask is made"
        num_blocks = -(-num_tokens // config.block_size)
        num_passing = min(2 ** (config.passed_keys or 0).bit_length() - 1, num_blocks)
        return num_blocks * (1 + min(config.neighbor_blocks, num_blocks) + -(-num_passing // 16))

    def sources(self, start: int, end: int) -> tuple[Range, ...]:
        """All from the first block that is seen, and the anchor, if it is not passed."""
        near = Range(self.block_edges[self._first_seen_block(start)], start)
        if self.passed_keys:
            return joined_ranges([near])
        return joined_ranges([Range(0, self.num_anchor_tokens(start)), near])

    def prefix(self, num_tokens: int) -> Mask:
        """The same blocks, of which the last may be cut."""
        return replace(self, block_edges=self.edges_to(num_tokens))._simplified()

    def num_anchor_tokens(self, start: int) -> int:
        """The anchor, but for the first block, which it is in."""
        return self.anchor_size if self._block(start) else 0

    def passed(self, start: int) -> tuple[Passed, ...]:
        """Of all blocks before the first one that is seen whole, the nearer ones more."""
        return tuple(self._passed(self._first_seen_block(start))) if self.passed_keys else ()

    def num_passed(self, start: int) -> int:
        """How many named keys the block of this token sees."""
        first_seen = self._first_seen_block(start) if self.passed_keys else 0
        if first_seen not in self._nums_passed:
            self._nums_passed[first_seen] = sum(num_keys for _, num_keys in self._passed(first_seen))
        return self._nums_passed[first_seen]

    def num_named(self, block: int) -> int:
        """`passed_keys`, and of the first block the anchor, too; at most all."""
        return self._num_passed(block, 1) if self.passed_keys else 0

    def _simplified(self) -> Mask:
        """With an anchor that is at most the first block. Where nothing is hidden or named, it is exact."""
        edges = self.block_edges
        if len(edges) == 1 or (len(edges) == 2 and not self.passed_keys):
            return ExactMask(edges)
        return replace(self, anchor_size=min(self.anchor_size, edges[1]))

    @cached_property
    def _nums_passed(self) -> dict[int, int]:
        """By the first block that is seen whole: planning asks for them again and again."""
        return {}

    def _passed(self, first_seen: int) -> Iterator[Passed]:
        """What is passed to those for whom this block is the first that they see whole."""
        nearest = max(0, first_seen - 2 ** self.passed_keys.bit_length())
        for block in chain(range(min(1, nearest)), range(nearest, first_seen)):
            if num_keys := self._num_passed(block, first_seen - block):
                yield Passed(block, num_keys)

    def _num_passed(self, block: int, distance: int) -> int:
        """Keys that a block passes to those `distance` blocks on, of which the next one is the first."""
        anchor_size = 0 if block else self.anchor_size
        size = self.block_edges[block + 1] - self.block_edges[block]
        return min(size, anchor_size + (self.passed_keys >> (distance - 1).bit_length()))

    def _first_seen_block(self, start: int) -> int:
        return max(0, self._block(start) - self.neighbor_blocks)

    def _block(self, token: int) -> int:
        return bisect_right(self.block_edges, token) - 1


MASKS: dict[str, type[Pattern]] = {"star": StarMask, "exact": ExactMask}
"""By `StarConfig.mode`."""


def possible_modes(config: StarConfig) -> tuple[str, ...]:
    """What its mode may come to, the one to prefer first; `auto` leaves a choice."""
    return ("exact", "star") if config.mode == "auto" else (config.mode,)


def mask_of(config: StarConfig, num_tokens: int, base: Mask | None = None) -> Mask:
    """The mask of a context of `num_tokens`, of which `base` is the mask of the beginning."""
    return MASKS[config.mode].of(config, num_tokens, base)


def mask_of_turns(config: StarConfig, edges: Iterable[int]) -> Mask:
    """The mask of a context that ends at the last of these rising edges, and at the others with its turns."""
    mask: Mask | None = None
    for num_tokens in edges:
        mask = mask_of(config, num_tokens, mask)
    assert mask is not None
    return mask


def most_sources(config: StarConfig, num_tokens: int) -> int:
    """About how many ranges the blocks of such a context see together, whatever its mode comes to."""
    return max(MASKS[mode].num_sources(config, num_tokens) for mode in possible_modes(config))


def even_edges(start: int, end: int, parts: int) -> list[int]:
    """Edges that cut [start, end) into `parts` ranges whose sizes differ by at most one."""
    return [start + (end - start) * i // parts for i in range(parts + 1)]


def joined_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[Range, ...]:
    """Ranges, by rising start, without the empty ones; those that overlap or touch are one."""
    joined: list[Range] = []
    for start, end in ranges:
        if joined and start <= joined[-1].end:
            joined[-1] = Range(joined[-1].start, max(joined[-1].end, end))
        elif start < end:
            joined.append(Range(start, end))
    return tuple(joined)


def _with_even_blocks(edges: tuple[int, ...], end: int, block_size: int) -> tuple[int, ...]:
    """Block edges continued to `end` by as few blocks of at most `block_size` as there can be, evenly."""
    num_blocks = -(-(end - edges[-1]) // block_size)
    return edges[:-1] + tuple(even_edges(edges[-1], end, num_blocks)) if num_blocks else edges
