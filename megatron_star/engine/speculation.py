"""Several tokens a step: which guesses are fed as proposals, for all sequences of a step together.

A guess that is not fed is compared with what comes all the same. So a sequence for which nothing is proposed
shows when that would pay, and costs only the guessing; which is kept to a small share of the time.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from megatron_star.engine.answer import Answer
from megatron_star.engine.draft_length import Acceptance, StepSeconds, draft_lengths
from megatron_star.engine.proposer import Guess, Proposer

SHARE_FOR_GUESSING = 0.005
"""Of the time, for guesses that were not right lately."""
MOST_TURNS_OF_REST = 15


@dataclass
class _Drafting:
    """What is known of one answer's guesses.

    Attributes:
        guess: what may come after its first `num_tokens` tokens.
        num_proposed: its first tokens, that are fed.
        rest: turns in which it is not guessed for.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    guess: Guess | None = None
    num_tokens: int = 0
    num_proposed: int = 0
    rest: int = 0


class Speculation:
    """Sets the proposals of answers; lives on the driver, in the engine's thread.

    Attributes:
        num_proposed, num_accepted: tokens, since the start.
    """

    def __init__(self, proposer: Proposer, vocab_size: int) -> None:
        self.proposer, self.vocab_size, self._seconds = proposer, vocab_size, StepSeconds()
        self._drafting: dict[int, _Drafting] = {}
        self._guess_seconds = self._step_seconds = 0.0
        self.num_proposed = self.num_accepted = 0

    def propose(self, running: Collection[Answer]) -> None:
        """Set the proposals for the next step."""
        speculating = [answer for answer in running if answer.request.speculate != "off"]
        if not speculating:
            return
        self.proposer.advance(speculating)
        for answer in speculating:
            self._compare(answer)
        guessed = self._guess([answer for answer in speculating if self._is_due(answer)])
        num_rows = sum(answer.is_answering for answer in running)
        if not guessed or not self._seconds.knows(num_rows):
            return
        chances = [self._drafting[answer.id].acceptance.chance(guess) for answer, guess in guessed]
        most = [min(len(guess.tokens), answer.most_proposed) for answer, guess in guessed]
        lengths = draft_lengths(chances, most, num_rows, self._seconds)
        for (answer, guess), length in zip(guessed, lengths, strict=True):
            answer.proposals = guess.tokens[:length]
            self._drafting[answer.id].num_proposed = length

    def note_step(self, num_rows: int, seconds: float) -> None:
        """A step of so many rows, one for each sequence and one for each proposal, took so long."""
        self._seconds.note(num_rows, seconds)
        self._step_seconds = seconds

    def forget(self, answer: Answer) -> None:
        """It has ended; its result is not made yet."""
        self._compare(answer)
        self._drafting.pop(answer.id, None)
        self.proposer.forget(answer)

    def _compare(self, answer: Answer) -> None:
        """Learn from what came in the place of a guess."""
        drafting = self._drafting.setdefault(answer.id, _Drafting())
        guess, num_proposed = drafting.guess, drafting.num_proposed
        drafting.guess, drafting.num_proposed = None, 0
        if guess is None:
            return
        num_right = drafting.acceptance.note(guess, answer.tokens[drafting.num_tokens :])
        if not num_right:
            drafting.rest = self._turns_of_rest()
        num_accepted = min(num_right, num_proposed)
        answer.num_proposed_tokens += num_proposed
        answer.num_accepted_tokens += num_accepted
        self.num_proposed += num_proposed
        self.num_accepted += num_accepted

    def _turns_of_rest(self) -> int:
        """So many that guessing in vain stays within its share of the time."""
        most_seconds = SHARE_FOR_GUESSING * self._step_seconds
        return min(MOST_TURNS_OF_REST, int(self._guess_seconds / most_seconds)) if most_seconds else 0

    def _is_due(self, answer: Answer) -> bool:
        drafting = self._drafting[answer.id]
        if not answer.is_answering or answer.most_proposed < 1:
            return False
        drafting.rest -= drafting.rest > 0
        return not drafting.rest

    def _guess(self, answers: Sequence[Answer]) -> list[tuple[Answer, Guess]]:
        """Guesses of tokens, of these answers that there are any for."""
        if not answers:
            return []
        start = perf_counter()
        guesses = self.proposer.guess(answers)
        self._guess_seconds = perf_counter() - start
        for answer, guess in zip(answers, guesses, strict=True):
            assert all(0 <= token < self.vocab_size for token in guess.tokens), f"no tokens: {guess.tokens}"
            drafting = self._drafting[answer.id]
            drafting.guess, drafting.num_tokens = guess, len(answer.tokens)
        return [(answer, guess) for answer, guess in zip(answers, guesses, strict=True) if guess.tokens]
