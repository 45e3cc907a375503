"""All tasks by name, and one sample of one of them."""

import random
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol, Self

from transformers import PreTrainedTokenizerBase

from megatron_star.evaluation.counting import COUNTING_TASKS
from megatron_star.evaluation.fitting import largest_fitting
from megatron_star.evaluation.needles import NEEDLE_TASKS
from megatron_star.evaluation.reading import READING_TASKS
from megatron_star.evaluation.sample import Draft, Sample, prompt_tokens
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tracing import TRACING_TASKS


class Task(Protocol):
    """A kind of sample. Frozen dataclasses; their numbers may be set by name.

    Attributes:
        num_tokens_to_generate: room for the answer.
        matching: `all` or `any` of the references; see `scoring`.
    """

    num_tokens_to_generate: int
    matching: str

    def draft(
        self, generator: random.Random, files: TaskFiles, length: int, index: int, depth: float | None
    ) -> Draft:
        """What the generator decides about a sample; its length is decided afterwards."""


GENERATED_TASKS: dict[str, Task] = {**NEEDLE_TASKS, **TRACING_TASKS, **COUNTING_TASKS}
TASKS: dict[str, Task] = {**GENERATED_TASKS, **READING_TASKS}
MOST_GENERATED = 100_000


@dataclass(frozen=True)
class NamedTask:
    """A task, and what it was asked for as."""

    name: str
    task: Task

    @classmethod
    def parse(cls, text: str) -> Self:
        """`variable_tracking`, or with numbers of its own `variable_tracking:chains=2,hops=6`.

        Raises:
            ValueError: there is no such task or number, or the number is out of bounds.
        """
        name, _, numbers = text.partition(":")
        if name not in TASKS:
            raise ValueError(f"no task {name!r}: the tasks are {', '.join(TASKS)}")
        changes = dict(_number(TASKS[name], part) for part in numbers.split(",") if numbers)
        task = replace(TASKS[name], **changes)
        if not 1 <= task.num_tokens_to_generate <= MOST_GENERATED:
            raise ValueError(
                f"{text!r}: num_tokens_to_generate is {task.num_tokens_to_generate}: it must be from 1 to "
                f"{MOST_GENERATED}"
            )
        return cls(text, task)


def _number(task: Task, text: str) -> tuple[str, int | float]:
    known = {field.name: field.type for field in fields(task) if field.type in (int, float)}
    name, _, value = text.partition("=")
    if name not in known:
        raise ValueError(f"{text!r}: what can be set is {', '.join(known)}")
    try:
        return name, known[name](value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {value!r} is not a number") from error


class SampleKey(NamedTuple):
    """Which sample. `depth` puts its first needle there, instead of where chance does."""

    named: NamedTask
    length: int
    index: int
    seed: int = 0
    depth: float | None = None

    @property
    def id(self) -> str:
        """As text."""
        place = "" if self.depth is None else f"@{self.depth:g}"
        return f"{self.named.name}/{self.length}/{self.seed}/{self.index}{place}"


@dataclass(frozen=True)
class SampleMaker:
    """Samples for one tokenizer. A sample depends on its key alone, not on what else is made."""

    tokenizer: PreTrainedTokenizerBase
    files: TaskFiles
    chat: bool

    def make(self, key: SampleKey) -> Sample:
        """A sample as long as fits `key.length` tokens, with the query and the room for the answer.

        Raises:
            ValueError: the length is too small for the task, or a file that it needs is missing or wrong.
            OSError: such a file cannot be read.
        """
        task = key.named.task
        # Without the depth: the same needles at another depth are another sample of the same question.
        generator = random.Random(f"{key.named.name}/{key.length}/{key.seed}/{key.index}")
        draft = task.draft(generator, self.files, key.length, key.index, key.depth)
        return Sample(
            id=key.id,
            task=key.named.name,
            length=key.length,
            seed=key.seed,
            index=key.index,
            context=draft.context(self._size(key, draft)),
            query=draft.query,
            answer_prefix=draft.answer_prefix,
            references=draft.references,
            depth=draft.depth,
            num_tokens_to_generate=task.num_tokens_to_generate,
        )

    def _size(self, key: SampleKey, draft: Draft) -> int:
        def num_tokens(size: int) -> int:
            context, query = prompt_tokens(self.tokenizer, draft, draft.context(size), chat=self.chat)
            return len(context) + len(query) + key.named.task.num_tokens_to_generate

        try:
            return largest_fitting(num_tokens, key.length, smallest=draft.smallest, largest=draft.largest)
        except ValueError as error:
            raise ValueError(f"{key.id}: {error}") from error
