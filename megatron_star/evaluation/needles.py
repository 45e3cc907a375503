"""RULER's needle-in-a-haystack tasks (arXiv 2404.06654, section 3 and appendix B)."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from megatron_star.evaluation import words
from megatron_star.evaluation.haystack import (
    Haystack,
    essay_haystack,
    noise_haystack,
    sentence_haystack,
)
from megatron_star.evaluation.sample import Draft
from megatron_star.evaluation.task_files import TaskFiles

KINDS: dict[str, tuple[str, Callable[[random.Random], Iterator[str]]]] = {
    "word": ("words", words.word_keys),
    "number": ("numbers", words.numbers),
    "uuid": ("uuids", words.uuids),
}
MOST_NEEDLES = 10_000
NUM_DEPTHS = 40
"""Random depths are multiples of 1 / (this - 1), as RULER's."""


def needle(kind: str, key: str, value: str) -> str:
    """The hidden sentence, as RULER has it."""
    return f"One of the special magic {KINDS[kind][0]} for {key} is: {value}."


@dataclass(frozen=True)
class NeedleTask:
    """Values of keys are hidden in a haystack; those of some keys are asked for.

    Attributes:
        haystack: `noise`, `essays`, or `needles` (of the same form, as many as there is room for).
        key_kind, value_kind: `word`, `number` or `uuid`.
        keys: that are hidden; `queries` of them are asked for, and each has so many `values`.
    """

    haystack: str
    key_kind: str = "word"
    value_kind: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    num_tokens_to_generate: int = 128
    matching: str = "all"

    def __post_init__(self) -> None:
        """Raises ValueError on a number out of bounds."""
        if not 1 <= self.queries <= self.keys:
            raise ValueError(f"queries is {self.queries}: it must be from 1 to keys, {self.keys}")
        if self.values < 1:
            raise ValueError(f"values is {self.values}: it must be at least 1")
        if self.keys * self.values > MOST_NEEDLES:
            raise ValueError(f"{self.keys} keys of {self.values} values: at most {MOST_NEEDLES} fit")

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """A sample; its first needle is at `depth`, or where the generator puts it."""
        keys, values = KINDS[self.key_kind][1](generator), KINDS[self.value_kind][1](generator)
        hidden = {key: list(islice(values, self.values)) for key in islice(keys, self.keys)}
        depths = [generator.randrange(NUM_DEPTHS) / (NUM_DEPTHS - 1) for _ in range(self.keys * self.values)]
        depths[0] = depths[0] if depth is None else depth
        sentences = [needle(self.value_kind, key, value) for key in hidden for value in hidden[key]]
        asked = list(hidden)[: self.queries]
        haystack = self._haystack(generator, files, (keys, values))
        introduction = self._introduction()
        needles = list(zip(depths, sentences, strict=True))
        return Draft(
            context=lambda size: f"{introduction}\n{haystack.with_needles(size, needles)}\n",
            query=self._query(asked),
            answer_prefix=self._answer_prefix(asked),
            references=tuple(value for key in asked for value in hidden[key]),
            depth=depths[0],
            smallest=0,
        )

    def _haystack(
        self, generator: random.Random, files: TaskFiles, others: tuple[Iterator[str], Iterator[str]]
    ) -> Haystack:
        if self.haystack == "noise":
            return noise_haystack()
        if self.haystack == "essays":
            return essay_haystack(files.essays, generator)
        return sentence_haystack(needle(self.value_kind, *pair) for pair in zip(*others, strict=False))

    def _introduction(self) -> str:
        name = KINDS[self.value_kind][0]
        return f"Somewhere in this text there are special magic {name}. Remember them: a question follows."

    def _query(self, asked: list[str]) -> str:
        name = KINDS[self.value_kind][0]
        if self.values * self.queries == 1:
            return f"Which special magic {name[:-1]} for {asked[0]} does the text mention?"
        return f"Which special magic {name} for {_listed(asked)} does the text mention? Name all of them."

    def _answer_prefix(self, asked: list[str]) -> str:
        name = KINDS[self.value_kind][0]
        if self.values * self.queries == 1:
            return f"The special magic {name[:-1]} for {asked[0]} that the text mentions is"
        return f"The special magic {name} for {_listed(asked)} that the text mentions are"


def _listed(keys: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(keys[:-1]), keys[-1])))


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essays"),
    "niah_single_3": NeedleTask("essays", value_kind="uuid"),
    "niah_multikey_1": NeedleTask("essays", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key_kind="uuid", value_kind="uuid"),
    "niah_multivalue": NeedleTask("essays", values=4),
    "niah_multiquery": NeedleTask("essays", keys=4, queries=4),
}
