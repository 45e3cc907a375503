"""RULER's aggregation tasks: which words of a list, or of a coded text, come most often."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice

from megatron_star.evaluation import words
from megatron_star.evaluation.sample import Draft
from megatron_star.evaluation.task_files import TaskFiles

NUM_COMMON = 10
REPETITIONS = ((4096, 30, 3), (2048, 10, 1), (0, 5, 1))
"""From so many tokens on: how often a common word comes, and any other. Below 4,096 tokens RULER has none."""
EXAMPLE_UNCOMMON, EXAMPLE_REPETITIONS = 10, (3, 1)
NUM_FREQUENT = 3
DOTS = "...."
LEAST_ALPHA, MOST_ALPHA = 1.01, 6.0
LISTED_WORDS = 2 * (10 + EXAMPLE_UNCOMMON)


@dataclass(frozen=True)
class CommonWordsTask:
    """A numbered list of words, ten of which come far more often than the others."""

    num_tokens_to_generate: int = 120
    matching: str = "all"

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """A sample; a unit is one more uncommon word. There is no depth."""
        vocabulary = generator.sample(files.essays.vocabulary, len(files.essays.vocabulary))
        if len(vocabulary) < LISTED_WORDS:
            where, found = files.essays.directory, len(vocabulary)
            raise ValueError(f"{where}: {found} plain words: common_words needs {LISTED_WORDS}")
        example, common, others = vocabulary[:20], vocabulary[20:30], vocabulary[30:]
        order = generator.getrandbits(64)
        often, seldom = next(pair for least, *pair in REPETITIONS if length >= least)
        query = "Which ten words come most often in the list above?"
        prefix = "The ten words that come most often in the list are:"
        shown = _numbered(example[:10], example[10:], EXAMPLE_REPETITIONS, order)
        answer = _enumerated(example[:NUM_COMMON])
        return Draft(
            context=lambda size: (
                f"{shown}{query}\n{prefix} {answer}\n\n"
                f"{_numbered(common, _enough(others, size), (often, seldom), order)}"
            ),
            query=query,
            answer_prefix=prefix,
            references=tuple(common),
        )


def _enough(vocabulary: list[str], count: int) -> list[str]:
    """So many different words: pairs where single ones do not suffice."""
    pairs = (f"{left}-{right}" for right in vocabulary for left in vocabulary)
    return list(islice(chain(vocabulary, pairs), count))


def _numbered(common: list[str], others: list[str], repetitions: tuple[int, int], order: int) -> str:
    often, seldom = repetitions
    listed = common * often + others * seldom
    random.Random(order).shuffle(listed)
    return f"Here is a numbered list of words. Remember those that come most often.\n{_enumerated(listed)}\n"


def _enumerated(listed: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))


@dataclass(frozen=True)
class FrequentWordsTask:
    """Coded words whose frequencies follow a zeta distribution; the most frequent "word" is dots.

    Attributes:
        alpha: the k-th most frequent word makes up a share of k ** -alpha / zeta(alpha), rounded.
    """

    alpha: float = 2.0
    num_tokens_to_generate: int = 50
    matching: str = "all"

    def __post_init__(self) -> None:
        """Raises ValueError if the frequencies cannot be told apart in a text that can be made."""
        if not LEAST_ALPHA <= self.alpha <= MOST_ALPHA:
            raise ValueError(f"alpha is {self.alpha}: it must be from {LEAST_ALPHA} to {MOST_ALPHA}")

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """A sample; a unit is a word of the text. There is no depth."""
        coded = list(islice(words.letters(generator, words.CODED_WORD_LETTERS), max(10, length // 50)))
        order = generator.getrandbits(64)

        def context(size: int) -> str:
            text = [w for w, count in self.counts([DOTS, *coded], size).items() for _ in range(count)]
            random.Random(order).shuffle(text)
            return f"Here is a coded text. Remember which of its words come most often.\n{' '.join(text)}\n"

        return Draft(
            context=context,
            query="Which three words come most often in the coded text above? Dots do not count.",
            answer_prefix="The three words that come most often in the coded text are:",
            references=tuple(coded[:NUM_FREQUENT]),
            smallest=self._fewest_words(),
        )

    def counts(self, coded: list[str], num_words: int) -> Counter[str]:
        """How often each word comes in a text of about `num_words`."""
        total = sum(k**-self.alpha for k in range(1, len(coded) + 1))
        shares = (k**-self.alpha / total for k in range(1, len(coded) + 1))
        return Counter({w: round(num_words * share) for w, share in zip(coded, shares, strict=True)})

    def _fewest_words(self) -> int:
        """So many that the last word that is asked for comes more often than the next one."""
        gap = (NUM_FREQUENT + 1) ** -self.alpha - (NUM_FREQUENT + 2) ** -self.alpha
        return int(2 / gap * (1 + 1 / (self.alpha - 1))) + 1


COUNTING_TASKS = {"common_words": CommonWordsTask(), "frequent_words": FrequentWordsTask()}
