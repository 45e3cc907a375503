"""What a user can choose about Star Attention: one frozen, validated dataclass, the table of all options."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

MODES = ("star", "exact", "auto")
DECODE_WEIGHTS = ("auto", "whole", "sliced")
"""What a CP rank reads of the weights in token generation: all, its slice, or whichever is faster."""
CUDA_GRAPH = ("auto", "on", "off")
"""Whether steps of token generation are captured in CUDA graphs; auto: on a GPU, where one rank has all of a
model and it can be."""
SPECULATE = ("lookup", "off")
"""How tokens are guessed, which a step then verifies: looked up in context and tail, or not at all."""
DEFAULT_SPECULATE = "lookup"
KV_DTYPES = ("auto", "int8", "fp8")
"""What keys and values of a context are kept in: as computed, or rounded to 8 bits."""
SMALLEST_USUAL_BLOCK = 128
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
MOST_TOKENS = 1 << 40
"""Of anything that is counted in tokens, far beyond any use: arithmetic on it stays within 64 bits."""
MOST_TOKENS_IN_REQUEST = 1 << 24


class FieldError(ValueError):
    """A value that is refused.

    Attributes:
        field: the name of the field that holds it, as whoever gave it knows it.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def parse_token_count(text: str) -> int:
    """A number of tokens as written on a command line: `4096`, `32K` or `1M` (powers of two).

    Raises:
        ValueError: the text is not a whole number of tokens from 0 to 2 ** 40.
    """
    digits, suffix = text.strip(), 1
    if digits and digits[-1].upper() in _SUFFIXES:
        digits, suffix = digits[:-1], _SUFFIXES[digits[-1].upper()]
    if not digits.isdecimal() or len(digits) > 20:
        raise ValueError(f"{text[:60]!r} is not a number of tokens: write 4096, 32K or 1M")
    number = int(digits) * suffix
    if number > MOST_TOKENS:
        raise ValueError(f"{text!r} is too many: at most {in_tokens(MOST_TOKENS)}")
    return number


def in_tokens(number: int) -> str:
    """As `parse_token_count` reads it, as short as can be."""
    for suffix, size in reversed(_SUFFIXES.items()):
        if number and number % size == 0:
            return f"{number // size}{suffix}"
    return str(number)


@dataclass(frozen=True, kw_only=True)
class Option:
    """What there is to know of an option besides its name, type and default.

    The command line, the text of a setting and the fields of a request are made from it.

    Attributes:
        help: of the command line.
        choices: the values that it may have; if there are none, it is a number.
        parse: a number as written; raises ValueError.
        placeholder: for a number in the command line's help. What is in TOKENS may be written 32K.
        least: the smallest number.
        most_in_request: the largest number that a request may ask for.
        in_requests: whether a request may set it.
        ignored_by: modes to which it makes no difference.
    """

    help: str
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] = parse_token_count
    placeholder: str = "TOKENS"
    least: int = 0
    most_in_request: int = MOST_TOKENS_IN_REQUEST
    in_requests: bool = True
    ignored_by: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> None:
        """Raises FieldError naming the option, its value and the bound."""
        if self.choices:
            if value not in self.choices:
                raise FieldError(f"{name} is {value!r}: it must be one of {', '.join(self.choices)}", name)
        elif not isinstance(value, int) or isinstance(value, bool) or value < self.least:
            raise FieldError(f"{name} is {value!r}: it must be a whole number of at least {self.least}", name)


def _option(default: Any, help: str, **values: Any) -> Any:
    return field(default=default, metadata={"option": Option(help=help, **values)})


@dataclass(frozen=True, kw_only=True)
class StarConfig:
    """How a context is encoded (arXiv 2411.17116; `neighbor_blocks`, `passed_keys` and `exact` are ours).

    Its fields are the table of the options: a further one is a further row. Sizes are in tokens. Without
    `block_size`, all sizes that are None are chosen by the length of the context (`planning/sizes.py`). With
    it, the others are as published: the anchor as large as the first block, and no passed keys. An anchor
    that is not set is small where passed keys are.

    Attributes:
        mode: `star`, `exact` (one block), or `auto` (exact wherever star would not be cheaper).
        block_size: upper bound of a block. Ignored by `exact`.
        anchor_size: tokens at the start of the context that every token sees.
        neighbor_blocks: blocks before its own that a token also sees.
        passed_keys: how many keys of the block before those that it sees whole a token also sees, in each
            layer and KV head: that block's most distinct ones. Of blocks farther back it sees fewer
            (`planning/mask.py`).
        anchor: `broadcast` encodes the anchor once and sends its KV; `recompute` encodes a copy of it for
            every later block, as published, and sends nothing.
        wave_tokens: upper bound of the tokens that one rank encodes in one forward pass. Copies of the
            anchor (`recompute`) come on top.

    Raises:
        FieldError: naming the field, its value and the bound.
    """

    mode: str = _option(
        "star",
        "what a context token sees: anchor and own block, or everything; auto: whichever is cheaper",
        choices=MODES,
    )
    block_size: int | None = _option(
        None,
        "at most so many in a block; default: chosen by the length, with the other sizes",
        least=1,
        ignored_by=("exact",),
    )
    anchor_size: int | None = _option(
        None,
        "beginning of the context that all blocks see; default: the first block, or chosen with the blocks",
        ignored_by=("exact",),
    )
    neighbor_blocks: int = _option(
        0,
        "blocks before its own that a token sees, too",
        parse=int,
        placeholder="N",
        most_in_request=1024,
        ignored_by=("exact",),
    )
    passed_keys: int | None = _option(
        None,
        "distinct keys of blocks before that a token sees, too; default: 0, or chosen with the blocks",
        placeholder="KEYS",
        ignored_by=("exact",),
    )
    anchor: str = _option(
        "broadcast",
        "encode the anchor once and send its KV, or again for every block, as published",
        choices=("broadcast", "recompute"),
        in_requests=False,
        ignored_by=("exact",),
    )
    wave_tokens: int = _option(
        32 * 1024,
        "most context tokens that a rank encodes in one forward pass (without a GPU, never above 2K)",
        least=1,
        in_requests=False,
    )

    def __post_init__(self) -> None:
        for row in fields(self):
            value = getattr(self, row.name)
            if value is not None or row.default is not None:
                row.metadata["option"].check(row.name, value)
        if self.anchor == "recompute" and self.passed_keys:
            raise FieldError(
                f"passed_keys is {self.passed_keys}: it must be 0 with anchor=recompute, which sends nothing",
                "passed_keys",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration with these fields set.

        Raises:
            ValueError: a key is not a field, or a value is out of bounds.
        """
        for key in values:
            if key not in OPTIONS:
                raise ValueError(
                    f"unknown Star Attention option {key!r}: the options are {', '.join(OPTIONS)}"
                )
        return cls(**values)

    def warning(self) -> str | None:
        """One line on a setting that is legal and probably a slip, or None."""
        if self.mode != "exact" and (self.block_size or sys.maxsize) < SMALLEST_USUAL_BLOCK:
            return (
                f"block size {self.block_size} is in tokens and very small: "
                f"{self.block_size}K ({self.block_size * 1024} tokens) is probably meant"
            )
        return None


OPTIONS: dict[str, Option] = {row.name: row.metadata["option"] for row in fields(StarConfig)}
"""By name, in the order of the fields."""
