"""Who sees what: the masks of a context, one class for each pattern.

A pattern is a class and its row in `MASKS`, under the name that `StarConfig.mode` has for it. The mask of a
context is made from the user's options, the number of tokens and the mask of the context that it extends.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

from megatron_star.config import StarConfig


class Range(NamedTuple):
    """[start, end) of context tokens, or of a forward pass's rows."""

    start: int
    end: int


@dataclass(frozen=True)
class Mask(ABC):
    """What tokens see of those before them. Within a block, a token sees all that come before it.

    Two contexts of the same tokens are encoded alike if their masks are equal.

    Attributes:
        block_edges: from 0 to the number of tokens. What a segment sees depends on the block that it is in.
    """

    block_edges: tuple[int, ...]

    @abstractmethod
    def sources(self, start: int, end: int) -> tuple[Range, ...]:
        """What the tokens [start, end) of one block see before `start`: a few ranges, rising and apart."""

    def num_anchor_tokens(self, start: int) -> int:
        """Tokens at the beginning of the context that the block of this token sees though it is not near.

        They see nothing but each other, so whoever needs them may encode them again.
        """
        return 0

    def hidden(self, position: int) -> tuple[Range, ...]:
        """What the token at `position` does not see of those before it."""
        seen = self.sources(position, position + 1)
        starts, ends = [0, *(r.end for r in seen)], [*(r.start for r in seen), position]
        return tuple(Range(*r) for r in zip(starts, ends, strict=True) if r[0] < r[1])

    @property
    def num_blocks(self) -> int:
        """0 for an empty context."""
        return len(self.block_edges) - 1

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


@dataclass(frozen=True)
class StarMask(Pattern):
    """Star Attention (arXiv 2411.17116, section 2.1): a token sees its block and the anchor.

    Attributes:
        anchor_size: tokens at the beginning that all blocks see; at most the first block.
        neighbor_blocks: blocks before its own that a token also sees.
    """

    anchor_size: int
    neighbor_blocks: int = 0

    @classmethod
    def of(cls, config: StarConfig, num_tokens: int, base: Mask | None = None) -> Mask:
        """Blocks as even as can be, behind those of the base. A lone block hides nothing, so it is exact."""
        edges = _with_even_blocks(base.block_edges if base else (0,), num_tokens, config.block_size)
        if len(edges) <= 2:
            return ExactMask(edges)
        anchor_size = config.block_size if config.anchor_size is None else config.anchor_size
        return cls(edges, min(anchor_size, edges[1]), config.neighbor_blocks)

    @staticmethod
    def num_sources(config: StarConfig, num_tokens: int) -> int:
        """Each block sees the anchor, or itself, and its neighbors."""
        num_blocks = -(-num_tokens // config.block_size)
        return num_blocks * (1 + min(config.neighbor_blocks, num_blocks))

    def sources(self, start: int, end: int) -> tuple[Range, ...]:
        """The anchor, and all from the first block that is seen."""
        first_seen = self.block_edges[max(0, self._block(start) - self.neighbor_blocks)]
        return joined_ranges([Range(0, self.num_anchor_tokens(start)), Range(first_seen, start)])

    def num_anchor_tokens(self, start: int) -> int:
        """The anchor, but for the first block, which it is in."""
        return self.anchor_size if self._block(start) else 0

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
