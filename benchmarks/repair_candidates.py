"""Candidates that repair star's loss, written as settings are: who sees what, in integers.

    exact
    star blocks=16                                          as published: the anchor is the first block
    star blocks=16 neighbors=1
    star blocks=16 anchor=64 passed=64 halving=1            passed keys, the most distinct ones
    star blocks=8 anchor=64 passed=64 select=scores rows=32 pooling=5
    star blocks=16 exact_layers=hidden:6                    or exact_layers=13+15+17, counted from 1
    star blocks=16 last_block=exact
    star blocks=16 spacing=log
    star blocks=16 delta=16                                 every 16th row sees all (arXiv 2505.11254)
    star blocks=16 asked_blocks=4                           or asked_bias=-1: how the question sees them

Options of different families can be put together. This module knows no tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, TypeAdapter

from megatron_star.checked_input import validated
from megatron_star.planning.mask import Range, even_edges, joined_ranges

HIDDEN = "hidden:"
AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[int, Field(ge=0)]


class Passed(NamedTuple):
    """So many of the keys that an earlier block names, the first ones."""

    block: int
    num_keys: int


class BlockView(NamedTuple):
    """What the block [start, end) sees besides, causally, itself.

    Attributes:
        whole: earlier tokens that it sees in each KV head.
        passed: what it sees of earlier blocks' named keys, which each KV head chooses for itself.
        num_passed: of them all together; fewer than the sum where `most` bounds it.
    """

    start: int
    end: int
    whole: tuple[Range, ...]
    passed: tuple[Passed, ...]
    num_passed: int

    @property
    def num_earlier(self) -> int:
        """Keys before the block that each of its rows sees."""
        return sum(r.end - r.start for r in self.whole) + self.num_passed

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        size = self.end - self.start
        return size * self.num_earlier + size * (size + 1) // 2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to encode a context, and to see it from the question.

    Attributes:
        blocks: 1 is exact attention.
        anchor: tokens at the beginning that all see; None is the first block, as published.
        neighbors: blocks before its own that a block sees whole.
        spacing: `log` shows a block those 1, 2, 4, 8, .. before it whole.
        last_block: `exact` sees everything.
        passed: keys that a block names at most, for blocks that do not see it whole.
        select: by which it names them; see `repair_selection`.
        rows, pooling: of `scores`: rows of the block that score, the last ones; keys over whose maximum a
            score is taken. 0 is the default of `select`.
        halving: blocks behind which a block passes half as many, and again with each doubling of the
            distance; 0 passes all to everybody. What is seen whole does not count to the distance.
        halving_each: `block` halves again with so many blocks more, not with each doubling.
        most: bound on the passed keys that a block sees, the best of them; 0 is none.
        exact_layers: layers without blocks, from 1: `13+15+17`, or `hidden:6`, those six in which star hides
            most of exact's attention (`evaluation/hidden_attention.py`).
        delta: of so many rows one also sees everything; what it gains is added to the rows up to the next.
        asked_blocks: blocks that a row of the question sees, those with the largest LSE, besides the first; 0
            is all.
        asked_bias: added to the scores of all blocks but the first.
    """

    blocks: AtLeastOne = 1
    anchor: AtLeastZero | None = None
    neighbors: AtLeastZero = 0
    spacing: Literal["near", "log"] = "near"
    last_block: Literal["star", "exact"] = "star"
    passed: AtLeastZero = 0
    select: Literal["keydiff", "scores", "norm", "last", "stride"] = "keydiff"
    rows: AtLeastZero = 0
    pooling: AtLeastZero = 0
    halving: AtLeastZero = 0
    halving_each: Literal["doubling", "block"] = "doubling"
    most: AtLeastZero = 0
    exact_layers: Annotated[str, Field(pattern=r"^(|hidden:[1-9]\d*|[1-9]\d*(\+[1-9]\d*)*)$")] = ""
    delta: AtLeastZero = 0
    asked_blocks: AtLeastZero = 0
    asked_bias: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of `exact`, or `star blocks=16 ..`.

        Raises:
            ValueError: saying what is wrong in which candidate.
        """
        mode, *options = text.split() or [""]
        values = dict(option.partition("=")[::2] for option in options)
        known = [field.name for field in fields(cls)]
        where = f"candidate {text!r}"
        if mode not in ("exact", "star") or (mode == "star") != ("blocks" in values):
            raise ValueError(f"{where}: it must be `exact`, or `star blocks=N` and what else")
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{where}: {unknown[0]!r} is none of {', '.join(known)}")
        if len(values) < len(options) or (mode == "exact" and values):
            raise ValueError(f"{where}: an option is set twice, or there is one that exact has not")
        candidate = validated(_ADAPTER, values, where)
        candidate._check(where)
        return candidate

    def _check(self, where: str) -> None:
        default, of_passed = Candidate(), ("select", "rows", "pooling", "halving", "halving_each", "most")
        alone = [name for name in of_passed if self._sets(name, default)]
        if alone and not self.passed:
            raise ValueError(f"{where}: {alone[0]} is of passed keys, and passed is 0")
        if self.halving_each == "block" and not self.halving:
            raise ValueError(f"{where}: halving_each is of halving, and halving is 0")
        if self.rows and self.select != "scores":
            raise ValueError(f"{where}: rows are of select=scores")
        if self.pooling and not self.pooling % 2:
            raise ValueError(f"{where}: pooling is {self.pooling}: it must be odd")
        if self.select == "stride" and (self.halving or self.most):
            raise ValueError(f"{where}: keys at a stride have no order: neither halving nor most")

    def _sets(self, name: str, default: Self) -> bool:
        return getattr(self, name) != getattr(default, name)

    def __str__(self) -> str:
        """The shortest text that `parse` reads as this candidate."""
        default = Candidate()
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if self._sets(f.name, default)]
        return " ".join(["star" if options else "exact", *options])

    @property
    def as_published(self) -> "Candidate":
        """Star of the same blocks, and nothing else."""
        return Candidate(blocks=self.blocks)

    def layers_without_blocks(self, num_layers: int) -> set[int]:
        """Those of `exact_layers`, which are named by number; raises ValueError if there is no such layer."""
        assert not self.exact_layers.startswith(HIDDEN)
        layers = {int(number) for number in self.exact_layers.split("+") if number}
        if layers and max(layers) > num_layers:
            raise ValueError(f"candidate {str(self)!r}: the model has {num_layers} layers")
        return layers

    def with_exact_layers(self, layers: Iterable[int]) -> "Candidate":
        """The same with these layers, counted from 1."""
        return replace(self, exact_layers="+".join(map(str, layers)))

    def edges(self, num_tokens: int) -> list[int]:
        """Of the blocks of a context."""
        return even_edges(0, num_tokens, min(self.blocks, num_tokens))

    def num_anchor(self, num_tokens: int) -> int:
        """Tokens of the anchor, at most the first block."""
        first = self.edges(num_tokens)[1]
        return first if self.anchor is None else min(self.anchor, first)

    def views(self, num_tokens: int) -> tuple[BlockView, ...]:
        """What each block of a context of at least one token sees."""
        edges, anchor = self.edges(num_tokens), self.num_anchor(num_tokens)
        ranges = [Range(*pair) for pair in zip(edges, edges[1:], strict=False)]
        views = []
        for block, (start, end) in enumerate(ranges):
            seen = self._blocks_seen(block, last=len(ranges) - 1)
            whole = joined_ranges([Range(0, anchor if block else 0), *(ranges[i] for i in seen)])
            passed = tuple(
                self._passed(i, block, ranges[i].end - (ranges[i].start or anchor))
                for i in range(block if self.passed else 0)
                if i not in seen
            )
            num_passed = sum(p.num_keys for p in passed)
            views.append(BlockView(start, end, whole, passed, min(num_passed, self.most or num_passed)))
        return tuple(views)

    def _blocks_seen(self, block: int, last: int) -> list[int]:
        """Earlier blocks that a block sees whole, rising."""
        if block == last and self.last_block == "exact":
            return list(range(block))
        at_doubling = (
            {block - (1 << i) for i in range(block.bit_length())} if self.spacing == "log" else set()
        )
        near = range(max(0, block - self.neighbors), block)
        return sorted({i for i in at_doubling if i >= 0}.union(near))

    def _passed(self, source: int, block: int, available: int) -> Passed:
        distance = block - source - self.neighbors
        farther = -(-distance // self.halving) - 1 if self.halving else 0
        halvings = farther if self.halving_each == "block" else farther.bit_length()
        return Passed(source, min(self.passed >> halvings, available))


_ADAPTER = TypeAdapter(Candidate)
