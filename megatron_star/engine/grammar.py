"""What answers may look like: a grammar says, token by token, what may come next."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Matcher(Protocol):
    """Where in a grammar one answer is."""

    @property
    def is_over(self) -> bool:
        """Nothing but an end token may follow."""

    def mask(self) -> Tensor | None:
        """Tokens that may come next: bits of [ceil(vocab_size / 32)] int32 words on the host; None is all."""

    def accept(self, tokens: Sequence[int]) -> int:
        """These tokens come; how many of them may, from the first on: the others did not come."""

    def rewind(self, num_tokens: int) -> None:
        """As many of the last tokens did not come after all."""


class Grammar(Protocol):
    """Compiled once; any number of answers follow it, side by side."""

    def matcher(self) -> Matcher:
        """At the beginning of an answer."""
