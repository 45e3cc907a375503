"""Questions from files of the user: SQuAD and HotpotQA among other documents (RULER), and BABILong."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypedDict

from pydantic import ConfigDict, Strict, TypeAdapter, with_config

from megatron_star.evaluation.sample import Draft
from megatron_star.evaluation.task_files import TaskFiles


class ReadingQuestion(NamedTuple):
    """A question, its accepted answers, and the documents that answer it."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


Dataset = tuple[list[ReadingQuestion], list[str]]
"""Questions, and all documents."""


_strict = with_config(ConfigDict(strict=True))


@_strict
class _SquadAnswer(TypedDict):
    text: str


@_strict
class _SquadQuestion(TypedDict):
    question: str
    answers: list[_SquadAnswer]


@_strict
class _SquadParagraph(TypedDict):
    context: str
    qas: list[_SquadQuestion]


@_strict
class _SquadArticle(TypedDict):
    paragraphs: list[_SquadParagraph]


@_strict
class _Squad(TypedDict):
    data: list[_SquadArticle]


_Pair = Strict(False)
"""JSON writes pairs as lists."""


@_strict
class _Hotpot(TypedDict):
    question: str
    answer: str
    context: list[Annotated[tuple[str, list[str]], _Pair]]
    supporting_facts: list[Annotated[tuple[str, int], _Pair]]


@_strict
class _Babilong(TypedDict):
    input: str
    question: str
    target: str


_BABILONG = TypeAdapter(_Babilong)


def read_squad(content: Any) -> Dataset:
    """SQuAD 1.1 or 2.0; questions without an answer are left out."""
    paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    questions = [
        ReadingQuestion(
            entry["question"], tuple(a["text"] for a in entry["answers"]), (paragraph["context"],)
        )
        for paragraph in paragraphs
        for entry in paragraph["qas"]
        if entry["answers"]
    ]
    return questions, sorted({paragraph["context"] for paragraph in paragraphs})


def read_hotpotqa(content: Any) -> Dataset:
    """HotpotQA's distractor setting: of each question's documents, those that hold supporting facts."""
    questions, documents = [], set()
    for entry in content:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]}
        documents |= set(texts.values())
        supporting = dict.fromkeys(title for title, _ in entry["supporting_facts"])
        gold = tuple(texts[title] for title in supporting if title in texts)
        questions.append(ReadingQuestion(entry["question"], (entry["answer"],), gold))
    return questions, sorted(documents)


@dataclass(frozen=True)
class ReadingTask:
    """A question whose documents stand, in random order, among as many others as there is room for."""

    file: str
    form: TypeAdapter[Any]
    read: Callable[[Any], Dataset]
    num_tokens_to_generate: int = 32
    matching: str = "any"

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """A sample; a unit is one more document.

        Raises:
            ValueError: the file is missing, or is of another form.
            OSError: it cannot be read.
        """
        questions, documents = self.read(files.json_of(self.file, self.form))
        if not questions:
            raise ValueError(f"{getattr(files, self.file)}: has no question with an answer")
        question = generator.choice(questions)
        others = [document for document in documents if document not in question.documents]
        generator.shuffle(others)
        order = generator.getrandbits(64)
        return Draft(
            context=lambda size: _documents([*question.documents, *others[:size]], order),
            query=f"Answer from the documents alone, in a few words. Question: {question.text}",
            answer_prefix="Answer:",
            references=question.answers,
            smallest=0,
            largest=len(others),
        )


def _documents(documents: list[str], order: int) -> str:
    random.Random(order).shuffle(documents)
    texts = [f"Document {number}:\n{document}" for number, document in enumerate(documents, 1)]
    return "Read these documents; a question follows.\n\n" + "\n\n".join(texts) + "\n\n"


@dataclass(frozen=True)
class BabilongTask:
    """The lines of a BABILong file, in order; their length is what it is, and must fit."""

    num_tokens_to_generate: int = 20
    matching: str = "all"

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """Line `index` of the file.

        Raises:
            ValueError: there is no such line, or it lacks a field.
            OSError: the file cannot be read.
        """
        lines = files.json_lines_of("babilong", _BABILONG)
        if index >= len(lines):
            raise ValueError(f"{files.babilong}: has {len(lines)} samples, but sample {index} is asked for")
        line = lines[index]
        return Draft(
            context=lambda _: f"{line['input']}\n",
            query=f"Answer in one word. Question: {line['question']}",
            answer_prefix="Answer:",
            references=(line["target"],),
            largest=1,
        )


READING_TASKS = {
    "squad": ReadingTask("squad", TypeAdapter(_Squad), read_squad),
    "hotpotqa": ReadingTask("hotpotqa", TypeAdapter(list[_Hotpot]), read_hotpotqa),
    "babilong": BabilongTask(),
}
