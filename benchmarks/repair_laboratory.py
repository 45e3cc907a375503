"""Candidates measured on samples of the evaluation's tasks, one process at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.repair_candidates import Candidate
from benchmarks.repair_costs import costs
from benchmarks.repair_model import RepairedModel, with_named_layers
from benchmarks.repair_report import Measured
from checkpoints_tools.hf_config import model_arguments, read_hf_config
from megatron_star.evaluation.sample import Sample, prompt_tokens
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import SampleKey, SampleMaker
from megatron_star.model.architecture import ModelParallelSizes, transformer_config
from megatron_star.planning.model_shape import ModelShape
from megatron_star.text.tokenizer import load_tokenizer

SEED_OF_LAYERS = 1
"""Of the samples by which layers are chosen: none of those that are measured, whose seed is 0."""


@dataclass(frozen=True)
class Question:
    """A sample in tokens; the answer is all that the references say."""

    sample: Sample
    context: list[int]
    query: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Laboratory:
    """A model, and samples for its tokenizer."""

    model: RepairedModel
    shape: ModelShape
    maker: SampleMaker

    @classmethod
    def open(cls, directory: Path, dtype: torch.dtype) -> "Laboratory":
        """A Hugging Face checkpoint; raises ValueError or OSError if it cannot be used."""
        args = model_arguments(read_hf_config(directory))
        shape = transformer_config(args, ModelParallelSizes(), dtype=dtype, device=torch.device("cpu"))
        maker = SampleMaker(load_tokenizer(directory), TaskFiles(), chat=True)
        return cls(RepairedModel.load(directory, dtype), shape, maker)

    def question(self, key: SampleKey) -> Question:
        """Raises ValueError or OSError if there is no such sample."""
        sample, tokenizer = self.maker.make(key), self.maker.tokenizer
        context, query = prompt_tokens(tokenizer, sample, sample.context, chat=self.maker.chat)
        answer = tokenizer.encode(f" {', '.join(sample.references)}", add_special_tokens=False)
        return Question(sample, context, query, answer)

    def with_named_layers(self, candidate: Candidate, keys: Sequence[SampleKey]) -> Candidate:
        """Its `exact_layers` by number, chosen on the first samples of these tasks with another seed."""
        others = dict.fromkeys(key._replace(index=0, seed=SEED_OF_LAYERS) for key in keys)
        contexts = (self.question(key).context for key in others)
        return with_named_layers(candidate, self.model, contexts)

    def measure(self, question: Question, candidate: Candidate, named: Candidate) -> Measured:
        """One candidate, as it was asked for and with its layers named, on one sample.

        Raises:
            ValueError: it does not fit the model.
        """
        encoded = self.model.encode(question.context, named)
        right, log_probability = self.model.outcome(encoded, named, question.query, question.answer)
        mine, exact, star = (
            costs(c, len(question.context), self.shape, self.model.model.dtype.itemsize)
            for c in (named, Candidate(), named.as_published)
        )
        sample = question.sample
        return Measured(
            id=record_id(sample.id, candidate),
            sample=sample.id,
            candidate=str(candidate),
            task=sample.task,
            length=sample.length,
            depth=sample.depth,
            num_tokens=len(question.context),
            layers=named.exact_layers,
            right=right,
            log_probability=log_probability,
            pairs=mine.pairs,
            operations=mine.operations,
            exact_operations=exact.operations,
            star_operations=star.operations,
            crossing_bytes=mine.crossing_bytes,
            seconds=encoded.seconds,
        )


def record_id(sample: str, candidate: Candidate) -> str:
    """Of what a candidate came to on a sample."""
    return f"{sample} {candidate}"
