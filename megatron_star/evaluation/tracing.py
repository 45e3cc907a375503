"""RULER's variable tracking: which names carry a value, through a chain of assignments."""

import random
import string
from dataclasses import dataclass
from itertools import islice

from megatron_star.evaluation import words
from megatron_star.evaluation.haystack import noise_haystack
from megatron_star.evaluation.sample import Draft
from megatron_star.evaluation.task_files import TaskFiles

NAME_LETTERS, VALUE_DIGITS = 5, 5
EXAMPLE_SENTENCES = 10
MOST_ASSIGNMENTS = 10_000


@dataclass(frozen=True)
class TracingTask:
    """`chains` values are each given to a name, and from name to name in `hops` more assignments.

    The names of the first chain are asked for. The assignments of a chain keep their order in the text. An
    example with its answer comes first, as in RULER.
    """

    chains: int = 1
    hops: int = 4
    num_tokens_to_generate: int = 30
    matching: str = "all"

    def __post_init__(self) -> None:
        """Raises ValueError on a number out of bounds."""
        for name in ("chains", "hops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.chains * self.hops > MOST_ASSIGNMENTS:
            raise ValueError(
                f"{self.chains} chains of {self.hops} hops: at most {MOST_ASSIGNMENTS} assignments fit"
            )

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """A sample; the first assignment of the first chain is at `depth`, if one is given."""
        example = _Chains(generator, self.chains, self.hops, None)
        asked = _Chains(generator, self.chains, self.hops, depth)
        shown = f"{example.text(EXAMPLE_SENTENCES)}{example.query}\n{example.answer}\n\n"
        return Draft(
            context=lambda size: shown + asked.text(size),
            query=asked.query,
            answer_prefix=asked.answer_prefix,
            references=asked.names[0],
            depth=depth,
            smallest=0,
        )


class _Chains:
    """Names, values and places of one text."""

    def __init__(self, generator: random.Random, chains: int, hops: int, depth: float | None) -> None:
        names = words.letters(generator, NAME_LETTERS, string.ascii_uppercase)
        self.names = [tuple(islice(names, hops + 1)) for _ in range(chains)]
        self.values = list(islice(words.numbers(generator, VALUE_DIGITS), chains))
        self.depths = [sorted(generator.random() for _ in range(hops + 1)) for _ in range(chains)]
        if depth is not None:
            self.depths[0] = sorted([depth, *(depth + (1 - depth) * d for d in self.depths[0][1:])])
        self.query = f"Which variables have the value {self.values[0]} in the text above? Name all of them."
        self.answer_prefix = (
            f"By the assignments in the text above, {hops + 1} variables have the value {self.values[0]}:"
        )
        self.answer = f"{self.answer_prefix} {' '.join(self.names[0])}"

    def text(self, num_sentences: int) -> str:
        assignments = []
        for names, value, depths in zip(self.names, self.values, self.depths, strict=True):
            sides = (value, *(f"VAR {name}" for name in names[:-1]))
            made = [f"VAR {name} = {side}" for name, side in zip(names, sides, strict=True)]
            assignments += zip(depths, made, strict=True)
        text = noise_haystack().with_needles(num_sentences, assignments)
        return f"Remember which variables have which value in this text.\n{text}\n"


TRACING_TASKS = {"variable_tracking": TracingTask()}
