"""Questions whose answers quote: documents of records, of code and of settings, and where to go on copying.

All are made by code, and the same every time. A query ends with the beginning of what is to be copied, for a
model that goes on writing. `FREE_TEXTS` are beginnings of texts that quote nothing.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

NAMES = [
    "Ada",
    "Bela",
    "Carl",
    "Dora",
    "Emil",
    "Frieda",
    "Georg",
    "Hanna",
    "Ivan",
    "Judit",
    "Karl",
    "Lena",
    "Milan",
    "Nora",
    "Otto",
    "Paula",
    "Rosa",
    "Sven",
]
PLACES = [
    "Bergen",
    "Cadiz",
    "Dover",
    "Esbjerg",
    "Fano",
    "Genoa",
    "Haifa",
    "Izmir",
    "Kotor",
    "Lagos",
    "Malmo",
    "Nantes",
    "Oran",
    "Porto",
    "Riga",
    "Split",
]
GOODS = [
    "anchors",
    "barley",
    "cables",
    "drums",
    "engines",
    "felt",
    "glass",
    "hinges",
    "ink",
    "jute",
    "kilns",
    "lamps",
    "mirrors",
    "nails",
    "oars",
    "paint",
]
VERBS = [
    "load",
    "parse",
    "merge",
    "check",
    "count",
    "split",
    "shift",
    "scale",
    "store",
    "trim",
    "pack",
    "sort",
]
NOUNS = ["rows", "pages", "blocks", "names", "edges", "files", "users", "terms", "lines", "parts", "sums"]
FREE_TEXTS = [
    "The first thing that I noticed about the old house was",
    "Dear editor, I am writing to you because",
    "In the spring of that year the river",
    "Whoever wants to learn to bake bread should",
    "The captain looked at the map for a long time, and then",
    "There are three reasons why small towns",
    "My grandmother used to say that",
    "What makes a good teacher? In my opinion",
]


class Document(NamedTuple):
    """A text, and parts of it that a question can ask to copy."""

    text: str
    parts: Sequence[str]


class QuotingQuestion(NamedTuple):
    """Context, and a query after which a model goes on copying."""

    context: str
    query: str


def documents(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Document]:
    """One of each kind, of about so many tokens."""
    kinds: Sequence[Callable[[random.Random, int], str]] = (_record, _function, _setting)
    return [_document(part, seed, tokenizer, num_tokens) for seed, part in enumerate(kinds)]


def questions(document: Document, count: int) -> list[QuotingQuestion]:
    """About different places of a document: the answer copies from there on."""
    places = random.Random(count).sample(range(1, len(document.parts) - 4), count)
    return [_question(document, place) for place in sorted(places)]


def _question(document: Document, place: int) -> QuotingQuestion:
    before, part = document.parts[place - 1], document.parts[place]
    begun = f"{before}{part[: len(part) // 3]}"
    return QuotingQuestion(document.text, f"\n\nOnce more, word for word:\n\n{begun}")


def _document(
    part: Callable[[random.Random, int], str],
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
) -> Document:
    draw, parts, length = random.Random(seed), [], 0
    while length < num_tokens:
        parts.append(part(draw, len(parts)))
        length += len(tokenizer.encode(parts[-1], add_special_tokens=False))
    return Document("".join(parts), parts)


def _record(draw: random.Random, number: int) -> str:
    return (
        f"Shipment {draw.randrange(1000, 9999)}: {draw.choice(NAMES)} and {draw.choice(NAMES)} sent "
        f"{draw.randrange(2, 90)} crates of {draw.choice(GOODS)} and {draw.randrange(2, 90)} of "
        f"{draw.choice(GOODS)} from {draw.choice(PLACES)} to {draw.choice(PLACES)}, paid "
        f"{draw.randrange(100, 999)} crowns, and asked for {draw.choice(GOODS)} in return.\n"
    )


def _function(draw: random.Random, number: int) -> str:
    name = f"{draw.choice(VERBS)}_{draw.choice(NOUNS)}_{number}"
    first, second, third = draw.sample(NOUNS, 3)
    return (
        f"def {name}({first}, {second}, limit={draw.randrange(2, 99)}):\n"
        f"    {third} = [{draw.choice(VERBS)}(x, {draw.randrange(9)}) for x in {first} if x < limit]\n"
        f"    for x in {second}:\n"
        f"        {third}.append({draw.choice(VERBS)}_{draw.choice(NOUNS)}(x) + {draw.randrange(99)})\n"
        f"    return {third}[{draw.randrange(9)}:]\n\n"
    )


def _setting(draw: random.Random, number: int) -> str:
    return (
        f'{{"id": {number}, "name": "{draw.choice(NAMES)} {draw.choice(PLACES)}", "{draw.choice(NOUNS)}": '
        f'{draw.randrange(999)}, "{draw.choice(GOODS)}": [{draw.randrange(99)}, {draw.randrange(99)}], '
        f'"{draw.choice(VERBS)}": "{draw.choice(PLACES)}"}},\n'
    )
