"""What answers may look like: a grammar says, token by token, what may come next."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class GrammarError(Exception):
    """An answer cannot follow its grammar any further: that is too complex, or allows no token."""


class Matcher(Protocol):
    """Where in a grammar one answer is. Used by one thread at a time; each method raises GrammarError."""

    @property
    def is_over(self) -> bool:
        """Nothing but an end token may follow."""

    @property
    def may_end(self) -> bool:
        """An end token may follow."""

    def mask(self) -> Tensor:
        """Tokens that may come next: bits of [ceil(vocab_size / 32)] int32 words on the host.

        The tokens that end this answer are among them where `may_end`, and only there.
        """

    def forced(self) -> list[int]:
        """Tokens of the only text that may follow, where there is but one; maybe none."""

    def accept(self, tokens: Sequence[int]) -> int:
        """These tokens come; how many of them may, from the first on: the others did not come."""

    def rewind(self, num_tokens: int) -> None:
        """As many of the last tokens did not come after all."""


class Grammar(Protocol):
    """Compiled once; any number of answers follow it, side by side."""

    def matcher(self, end_tokens: Sequence[int]) -> Matcher:
        """At the beginning of an answer that each of these tokens ends; from any thread."""
