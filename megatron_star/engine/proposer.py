"""The seam for whoever guesses tokens: prompt lookup here; a draft model or further heads elsewhere.

A step verifies what is guessed, so answers do not depend on it. Everything here runs on the driver.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from megatron_star.engine.answer import Answer


class Guess(NamedTuple):
    """Tokens that may come next in an answer.

    Attributes:
        tokens: at most `MOST_PROPOSED_TOKENS` of the model's vocabulary; maybe none.
        kind: how often guesses are right is learned for each kind of them.
        chance: that a token is right if those before it are, before anything was learned about this kind.
    """

    tokens: list[int]
    kind: int = 0
    chance: float = 0.5


class Proposer(Protocol):
    """Guesses how answers go on. Called in the engine's thread, between two steps."""

    def advance(self, answers: Collection[Answer]) -> None:
        """Called in every turn with the running requests that may be guessed for, also before their first
        token: the place for work ahead, in small pieces."""

    def guess(self, answers: Sequence[Answer]) -> list[Guess]:
        """What follows the last token of each of these; not every answer is asked about in every turn."""

    def forget(self, answer: Answer) -> None:
        """It has ended; it may never have been seen here."""
