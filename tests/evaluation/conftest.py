"""Samples without a model: a tokenizer of words, and essays of made-up sentences."""

import random
import re
import string
from pathlib import Path

import pytest

from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker


class WordTokenizer:
    """One token for each word, number and mark, as far as samples need a tokenizer."""

    chat_template = None
    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Every word is token 1; what counts is how many there are."""
        return [1] * len(re.findall(r"\w+|[^\w\s]|\n", text))


@pytest.fixture(scope="session")
def essays(tmp_path_factory) -> Path:
    """A folder of three texts with some hundred different words."""
    folder = tmp_path_factory.mktemp("essays")
    generator = random.Random(0)
    words = ["".join(generator.choices(string.ascii_lowercase, k=6)) for _ in range(700)]
    for name in "abc":
        sentences = (" ".join(generator.sample(words, 9)).capitalize() + "." for _ in range(60))
        (folder / f"{name}.txt").write_text("\n".join(sentences))
    return folder


@pytest.fixture
def maker(essays) -> SampleMaker:
    """Makes samples of these essays."""
    return SampleMaker(WordTokenizer(), TaskFiles(essay_folder=essays), chat=False)


@pytest.fixture
def make(maker):
    """A sample by the text of its task."""

    def make(task: str, length: int = 1500, index: int = 0, **options):
        return maker.make(SampleKey(NamedTask.parse(task), length, index, **options))

    return make
