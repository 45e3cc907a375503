"""How many guessed tokens a step verifies: as many as make tokens come fastest, by what was seen so far.

Two things are learned: how often guesses of a kind are right in an answer, and how long steps of so many rows
take. Guesses that are not fed teach the first as well as those that are.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from megatron_star.engine.proposer import Guess

REMEMBERED_GUESSES = 16
"""Tokens, about, that a kind's share of right ones is taken of."""
PRIOR_GUESSES = 2
"""Tokens that a proposer's own opinion counts as."""
NUM_SAMPLES = 5
"""Steps with so many rows, the median of which is taken."""
FEWEST_SAMPLES = 2
"""Below which it is not known how long such a step takes."""
MOST_AGE = 256
"""Steps after which steps with so many rows are measured anew: other requests run by then."""
COST_OF_UNKNOWN_ROW, SHARE_OF_UNKNOWN_ROW = 0.02, 0.25
"""What a row beyond those that were measured takes, of a step, or of a row of it: little, so it is tried."""
LEAST_GAIN = 1.02
"""Of tokens a second, below which nothing is proposed."""


class Acceptance:
    """How often the guesses for one answer are right."""

    def __init__(self) -> None:
        self._kinds: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def chance(self, guess: Guess) -> float:
        """That a token of this guess is right if those before it are; less than 1."""
        right, tried = self._kinds[guess.kind]
        return (right + PRIOR_GUESSES * guess.chance) / (tried + PRIOR_GUESSES)

    def note(self, guess: Guess, came: Sequence[int]) -> int:
        """These tokens came in the place of a guess. Returns how many of them it had, up to the first that it
        had not."""
        num_right = 0
        for guessed, token in zip(guess.tokens, came, strict=False):
            counts = self._kinds[guess.kind]
            counts[:] = [count * (1 - 1 / REMEMBERED_GUESSES) for count in counts]
            counts[1] += 1
            if guessed != token:
                break
            counts[0] += 1
            num_right += 1
        return num_right


class StepSeconds:
    """How long steps of so many rows took lately: rows of all sequences together."""

    def __init__(self) -> None:
        self._samples: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_SAMPLES))
        self._last_steps: dict[int, int] = {}
        self._medians: dict[int, float] = {}
        self._num_steps = 0

    def note(self, num_rows: int, seconds: float) -> None:
        """A step that did nothing else took so long."""
        self._num_steps += 1
        self._forget_old()
        size = _bucket(num_rows)
        samples = self._samples[size]
        samples.append(seconds)
        self._last_steps[size] = self._num_steps
        if len(samples) >= FEWEST_SAMPLES:
            self._medians[size] = median(samples)

    def knows(self, num_rows: int) -> bool:
        """Steps of so many rows were measured."""
        return _bucket(num_rows) in self._medians

    def expected(self, num_rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of steps of so many rows: as measured, between the nearest that were, or a little more than the
        largest. Some must have been."""
        known = np.array(sorted(self._medians.items()))
        largest = known[-1, 0]
        further = np.maximum(0, num_rows - largest) * min(COST_OF_UNKNOWN_ROW, SHARE_OF_UNKNOWN_ROW / largest)
        return np.interp(num_rows, *known.T) * (1 + further)

    def _forget_old(self) -> None:
        oldest = self._num_steps - MOST_AGE
        for size in [size for size, last in self._last_steps.items() if last <= oldest]:
            del self._last_steps[size], self._samples[size]
            self._medians.pop(size, None)


def _bucket(num_rows: int) -> int:
    """The rows themselves up to 16, then 8 sizes from one power of two to the next."""
    shift = max(0, num_rows.bit_length() - 4)
    return num_rows >> shift << shift


def draft_lengths(
    chances: Sequence[float], most: Sequence[int], num_rows: int, steps: StepSeconds
) -> list[int]:
    """How many tokens to propose for each of some sequences, so that most tokens a second are to be expected.

    A further row is worth the chance that its token is kept. The worthiest rows come first, whosesoever they
    are, as long as they pay for what all sequences wait for them.

    Args:
        chances: of each sequence, that a proposed token is right if those before it are; below 1.
        most: of each, the tokens that can be proposed.
        num_rows: of the step without proposals: of these sequences, and of others.
    """
    longest = max(most)
    worths = np.array(chances)[:, None] ** np.arange(1, longest + 1)
    worths[np.arange(1, longest + 1) > np.array(most)[:, None]] = 0
    order = np.argsort(-worths, axis=None, kind="stable")
    num_tokens = num_rows + np.cumsum([0, *worths.ravel()[order]])
    rates = num_tokens / steps.expected(num_rows + np.arange(num_tokens.size))
    rates[0] *= LEAST_GAIN
    lengths = np.bincount(order[: rates.argmax()] // longest, minlength=len(most))
    return np.minimum(lengths, most).tolist()
