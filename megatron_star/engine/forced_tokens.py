"""Tokens that a grammar forces are guessed before all others: braces, names, the rest of a choice."""

from collections.abc import Collection, Sequence

from megatron_star.engine.answer import Answer
from megatron_star.engine.proposer import Guess, Proposer
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS

FORCED_KIND = -1
"""Of these guesses; those of the other proposer are of other kinds."""
CHANCE = 0.9
"""That the model cuts the only text into the tokens that the tokenizer would cut it into."""


class ForcedTokens:
    """See `Proposer`: what the grammar forces, and elsewhere the guesses of another one."""

    def __init__(self, other: Proposer) -> None:
        self._other = other

    def advance(self, answers: Collection[Answer]) -> None:
        """See `Proposer`."""
        self._other.advance(answers)

    def guess(self, answers: Sequence[Answer]) -> list[Guess]:
        """See `Proposer`."""
        free = [answer for answer in answers if not _forced(answer)]
        others = iter(self._other.guess(free) if free else ())
        return [
            Guess(forced, FORCED_KIND, CHANCE) if (forced := _forced(answer)) else next(others)
            for answer in answers
        ]

    def forget(self, answer: Answer) -> None:
        """See `Proposer`."""
        self._other.forget(answer)


def _forced(answer: Answer) -> list[int]:
    return answer.guide.forced[:MOST_PROPOSED_TOKENS] if answer.guide else []
