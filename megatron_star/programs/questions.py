"""What evaluate.py has still to ask: samples of all cells, in all settings, but what is answered."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import batched, product
from pathlib import Path
from typing import Any

from megatron_star.checked_input import strict_fields
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.request import StarRequest
from megatron_star.evaluation.results import ScoredAnswer
from megatron_star.evaluation.sample import Sample, greedy_request
from megatron_star.evaluation.sources import Sources
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.job.asked import of_model, of_ranks, of_tokens
from megatron_star.job.output import AnswerLines, check_asked_the_same
from megatron_star.job.progress import heartbeat

PROGRAM = "eval"
SOURCES = ("squad", "hotpotqa", "babilong")


class _Record(ScoredAnswer):
    """What a line must have to be of this program."""

    asked: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A sample for one setting, as a request."""

    sample: Sample
    setting: str
    matching: str
    request: StarRequest

    @property
    def id(self) -> str:
        """Of its answer."""
        return answer_id(self.setting, self.sample.id)


def answer_id(setting: str, sample_id: str) -> str:
    """Unique in a file."""
    return f"{setting}/{sample_id}"


def cells(args: argparse.Namespace) -> list[tuple[NamedTask, int, float | None]]:
    """Task, length and depth of every group of samples."""
    return list(product(args.tasks, args.lengths, args.depths))


def num_open(args: argparse.Namespace, finished: set[str]) -> int:
    """Answers that are still to come."""
    names = (
        answer_id(setting, SampleKey(task, length, index, args.seed, depth).id)
        for task, length, depth in cells(args)
        for index, setting in product(range(args.samples), args.settings)
    )
    return sum(name not in finished for name in names)


@dataclass(frozen=True)
class Output:
    """The file of `--output`, and what is asked with every question of this run."""

    lines: AnswerLines
    asked: Mapping[str, Any]

    def asked_with(self, question: Question) -> dict[str, Any]:
        """What was asked, beyond what the answer's id says, to compare with what a later run asks."""
        request = question.request
        return {**self.asked, "prompt": of_tokens([*request.context_tokens, *request.query_tokens])}


def open_output(args: argparse.Namespace, held: ExitStack) -> Output:
    """The output, which is let go with `held`, before anything is loaded.

    Raises:
        ValueError, OSError: it is no file for this run, or holds answers of another model or another kind
            of job; or a file that a task needs is missing.
    """
    asked = of_model(args) | of_ranks(args) | {"max_batch_size": args.max_batch_size, "chat": args.chat}
    sources = {f"--{name}": getattr(args, name) for name in SOURCES}
    for option, path in sources.items():
        if path and not path.is_file():
            raise ValueError(f"{option}: {path}: no such file")
    lines = held.enter_context(AnswerLines(args.output, PROGRAM, strict_fields(_Record), sources))
    for name, record in lines.records.items():
        then = {key: value for key, value in record["asked"].items() if key != "prompt"}
        check_asked_the_same(then, asked, f"{lines.path}: {name!r}")
    return Output(lines, asked)


def check_questions(
    args: argparse.Namespace, output: Output, engine: StarEngine, maker: SampleMaker
) -> set[str]:
    """The answers that are there. Makes one sample of each cell, so that mistakes show at the start.

    Raises:
        ValueError, OSError: such a sample cannot be made, or is another than the one that was answered.
    """
    longest = max(args.lengths)
    if longest > engine.max_sequence_length:
        raise ValueError(f"--lengths has {longest}, but the model's limit is {engine.max_sequence_length}")
    with heartbeat("making the first samples"):
        for task, length, depth in cells(args):
            sample = maker.make(SampleKey(task, length, 0, args.seed, depth))
            for setting, star in args.settings.items():
                question = _question(sample, setting, star, task, maker)
                engine.prepare(question.request)
                output.lines.finished({question.id: output.asked_with(question)})
    return set(output.lines.records)


def open_questions(
    args: argparse.Namespace, maker: SampleMaker, finished: set[str]
) -> Iterator[list[Question]]:
    """Batches of one setting each; a batch of samples is asked in all settings before the next batch.

    Raises:
        ValueError, OSError: a sample cannot be made.
    """
    for task, length, depth in cells(args):
        keys = (SampleKey(task, length, index, args.seed, depth) for index in range(args.samples))
        for batch in batched(keys, args.max_batch_size):
            samples = {}
            for setting, star in args.settings.items():
                wanted = [key for key in batch if answer_id(setting, key.id) not in finished]
                samples |= {key: maker.make(key) for key in wanted if key not in samples}
                if wanted:
                    yield [_question(samples[key], setting, star, task, maker) for key in wanted]


def sources_of(args: argparse.Namespace) -> Sources:
    """The files and folders of the command line."""
    return Sources(args.essays, *(getattr(args, name) for name in SOURCES))


def model_name(args: argparse.Namespace) -> str:
    """The name of the checkpoint's folder."""
    return Path(args.load).resolve().name


def _question(
    sample: Sample, setting: str, star: StarConfig, task: NamedTask, maker: SampleMaker
) -> Question:
    request = greedy_request(maker.tokenizer, sample, star, chat=maker.chat)
    return Question(sample, setting, task.task.matching, request)
