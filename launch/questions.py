"""What evaluate.py has still to ask: samples of all cells, in all settings, but what is answered."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched, product
from pathlib import Path

from launch.documents import finished_ids
from megatron_star.config import StarConfig
from megatron_star.evaluation.results import read_answers
from megatron_star.evaluation.sample import Sample, greedy_request
from megatron_star.evaluation.sources import Sources
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.inference.engine import StarEngine
from megatron_star.inference.request import StarRequest


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


def check_questions(args: argparse.Namespace, engine: StarEngine, maker: SampleMaker) -> set[str]:
    """The answers that are there. Makes one sample of each cell, so that mistakes show at the start."""
    finished = finished_ids(args.output)
    _check_same_run(args)
    for task, length, depth in cells(args):
        sample = maker.make(SampleKey(task, length, 0, args.seed, depth))
        for setting, star in args.settings.items():
            engine.check(_question(sample, setting, star, task, maker).request)
    return finished


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
    return Sources(args.essays, args.squad, args.hotpotqa, args.babilong)


def _check_same_run(args: argparse.Namespace) -> None:
    path = Path(args.output)
    for answer in read_answers([path]) if path.exists() else ():
        if (answer.model, answer.chat) != (model_name(args), args.chat):
            raise ValueError(
                f"{path}: holds answers of {answer.model} with chat={answer.chat}: give another --output"
            )


def model_name(args: argparse.Namespace) -> str:
    """The name of the checkpoint's folder."""
    return Path(args.load).resolve().name


def _question(
    sample: Sample, setting: str, star: StarConfig, task: NamedTask, maker: SampleMaker
) -> Question:
    request = greedy_request(maker.tokenizer, sample, star, chat=maker.chat)
    return Question(sample, setting, task.task.matching, request)
