"""What a user can choose about Star Attention: one frozen, validated dataclass."""

from dataclasses import dataclass, fields
from typing import Any, Self

from megatron_star.checked_input import FieldError

MODES = ("star", "exact", "auto")
ANCHOR_TRANSFERS = ("broadcast", "recompute")
DECODE_WEIGHTS = ("auto", "whole", "sliced")
"""What a CP rank reads of the weights in token generation: all, its slice, or whichever is faster."""
SMALLEST_USUAL_BLOCK = 128
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
MOST_TOKENS = 1 << 40
"""Of anything that is counted in tokens, far beyond any use: arithmetic on it stays within 64 bits."""


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
class StarConfig:
    """How a context is encoded (arXiv 2411.17116; `neighbor_blocks` and `exact` are ours).

    Attributes:
        mode: `star`, `exact` (one block), or `auto` (exact wherever star would not be cheaper).
        block_size: upper bound of a block, in tokens. Ignored by `exact`.
        anchor_size: tokens at the start of the context that every token sees; None means block_size.
        neighbor_blocks: blocks before its own that a token also sees.
        anchor: `broadcast` encodes the anchor once and sends its KV; `recompute` encodes a copy of it for
            every later block, as published, and sends nothing.
        wave_tokens: upper bound of the tokens that one rank encodes in one forward pass. Copies of the
            anchor (`recompute`) come on top.

    Raises:
        ValueError: naming the field, its value and the bound.
    """

    mode: str = "star"
    block_size: int = 32 * 1024
    anchor_size: int | None = None
    neighbor_blocks: int = 0
    anchor: str = "broadcast"
    wave_tokens: int = 32 * 1024

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("anchor", self.anchor, ANCHOR_TRANSFERS)
        _check_at_least("block_size", self.block_size, 1)
        _check_at_least("neighbor_blocks", self.neighbor_blocks, 0)
        _check_at_least("wave_tokens", self.wave_tokens, 1)
        if self.anchor_size is not None:
            _check_at_least("anchor_size", self.anchor_size, 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration with these fields set.

        Raises:
            ValueError: a key is not a field, or a value is out of bounds.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"unknown Star Attention option {key!r}: the options are {', '.join(known)}")
        return cls(**values)

    def warning(self) -> str | None:
        """One line on a setting that is legal and probably a slip, or None."""
        if self.mode != "exact" and self.block_size < SMALLEST_USUAL_BLOCK:
            return (
                f"block size {self.block_size} is in tokens and very small: "
                f"{self.block_size}K ({self.block_size * 1024} tokens) is probably meant"
            )
        return None


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FieldError(f"{name} is {value!r}: it must be one of {', '.join(choices)}", name)


def _check_at_least(name: str, value: object, bound: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise FieldError(f"{name} is {value!r}: it must be a whole number of at least {bound}", name)
