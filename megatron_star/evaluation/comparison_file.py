"""Answers to a user's questions as JSON Lines: what a calibration goes on with.

A line is exact's answer to one question, or one setting's comparison with it.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Self

from megatron_star.checked_input import strict_dictionary, strict_fields
from megatron_star.evaluation.comparison import Comparison, ExactAnswer
from megatron_star.job.answer_files import AnswerLines, check_asked_the_same

PROGRAM = "calibrate"


class _Record:
    """What a line must have to be of this program: `exact` or `comparison`."""

    id: str
    question: str
    setting: str
    asked: dict[str, Any]
    exact: strict_dictionary(ExactAnswer) | None
    comparison: strict_dictionary(Comparison) | None


_RECORD = strict_fields(_Record)


class ComparisonFile:
    """The file that a calibration writes, or continues.

    Attributes:
        exact: exact's answers by question.
        comparisons: of each setting, by question.
    """

    def __init__(self, path: str, input_path: str, asked: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            input_path: where the questions are from.
            asked: what is asked about each question, by its id.

        Raises:
            ValueError, OSError: the file cannot be written to, or holds something else.
        """
        self.lines, self._asked = AnswerLines(path, PROGRAM, _RECORD, {"--input-jsonl": input_path}), asked
        self.exact: dict[str, ExactAnswer] = {}
        self.comparisons: dict[str, dict[str, Comparison]] = {}
        try:
            for record in self.lines.records.values():
                self._check(record, input_path)
                self._note(record)
        except BaseException:
            self.lines.close()
            raise

    def _check(self, record: Mapping[str, Any], input_path: str) -> None:
        path, question = self.lines.path, record["question"]
        if question not in self._asked:
            raise ValueError(
                f"{path}: has the question {question!r}, which {input_path} lacks: give another --output"
            )
        check_asked_the_same(record["asked"], self._asked[question], f"{path}: {question!r}")
        if (record["exact"] is None) == (record["comparison"] is None):
            raise ValueError(
                f"{path}: {record['id']!r} has to be exact's answer or a comparison, and one of them"
            )

    def _note(self, record: Mapping[str, Any]) -> None:
        if record["exact"]:
            self.exact[record["question"]] = ExactAnswer(**record["exact"])
        else:
            of_setting = self.comparisons.setdefault(record["setting"], {})
            of_setting[record["question"]] = Comparison(**record["comparison"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()

    def check_same_settings(self, settings: Collection[str]) -> None:
        """Raises ValueError unless every line is from a calibration of these settings."""
        if any(set(answer.hidden_masses) != set(settings) for answer in self.exact.values()):
            raise ValueError(f"{self.lines.path}: compares other settings: give another --output")

    def add_exact(self, question: str, answer: ExactAnswer) -> None:
        """Write exact's answer to a question."""
        self._add(question, "exact", exact=asdict(answer), comparison=None)

    def add(self, question: str, setting: str, comparison: Comparison) -> None:
        """Write a setting's comparison with it."""
        self._add(question, setting, exact=None, comparison=asdict(comparison))

    def _add(self, question: str, setting: str, **answer: Any) -> None:
        record = {"id": f"{setting}/{question}", "question": question, "setting": setting}
        record |= {"asked": self._asked[question]} | answer
        self.lines.append([record])
        self._note(record)
