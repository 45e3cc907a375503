"""Where `megatron-star eval` writes, and what it compares with what an earlier run asked."""

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from megatron_star.checked_input import strict_fields
from megatron_star.evaluation.questions import Question
from megatron_star.evaluation.results import ScoredAnswer
from megatron_star.job.answer_files import AnswerLines, check_asked_the_same
from megatron_star.job.asked import of_model, of_ranks, of_tokens

PROGRAM = "eval"
TASK_FILES = ("squad", "hotpotqa", "babilong")


class _ScoredRecord(ScoredAnswer):
    """What a line must have to be of this program."""

    asked: dict[str, Any]


@dataclass(frozen=True)
class EvaluationOutput:
    """The file of `--output`, and what is asked with every question of this run."""

    lines: AnswerLines
    asked: Mapping[str, Any]

    def asked_with(self, question: Question) -> dict[str, Any]:
        """What was asked, beyond what the answer's id says, to compare with what a later run asks."""
        request = question.request
        return {**self.asked, "prompt": of_tokens([*request.context_tokens, *request.query_tokens])}


def open_output(args: argparse.Namespace, held: ExitStack) -> EvaluationOutput:
    """The output, which is let go with `held`, before anything is loaded.

    Raises:
        ValueError, OSError: it is no file for this run, or holds answers of another model or another kind
            of job; or a file that a task needs is missing.
    """
    asked = of_model(args) | of_ranks(args) | {"max_batch_size": args.max_batch_size, "chat": args.chat}
    files = {f"--{name}": getattr(args, name) for name in TASK_FILES}
    for option, path in files.items():
        if path and not path.is_file():
            raise ValueError(f"{option}: {path}: no such file")
    lines = held.enter_context(AnswerLines(args.output, PROGRAM, strict_fields(_ScoredRecord), files))
    for name, record in lines.records.items():
        then = {key: value for key, value in record["asked"].items() if key != "prompt"}
        check_asked_the_same(then, asked, f"{lines.path}: {name!r}")
    return EvaluationOutput(lines, asked)
