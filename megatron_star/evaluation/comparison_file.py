"""Comparisons on a user's questions as JSON Lines, one line a question: what calibration goes on with."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Self

from megatron_star.checked_input import json_lines, place, strict_dictionary, strict_fields, validated
from megatron_star.evaluation.calibration import Comparisons
from megatron_star.evaluation.comparison import Comparison
from megatron_star.job.answer_files import AnswerLines

PROGRAM = "calibrate"


class _ComparisonRecord:
    """What a line must have to be of this program."""

    id: Any
    asked: dict[str, Any]
    tokens: list[int]
    settings: dict[str, strict_dictionary(Comparison)]


_RECORD = strict_fields(_ComparisonRecord)


class ComparisonFile:
    """The file that a calibration writes, or continues."""

    def __init__(self, path: str, input_path: str, asked: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            input_path: where the questions are from.
            asked: what is asked about each question, by its id.

        Raises:
            ValueError, OSError: the file cannot be written to, or holds something else.
        """
        self.lines, self._asked = AnswerLines(path, PROGRAM, _RECORD, {"--input-jsonl": input_path}), asked
        try:
            self._check(input_path)
        except BaseException:
            self.lines.close()
            raise

    def _check(self, input_path: str) -> None:
        self.lines.finished(self._asked)
        if strangers := self.lines.records.keys() - self._asked.keys():
            raise ValueError(
                f"{self.lines.path}: has {len(strangers)} questions that {input_path} lacks, "
                f"{min(strangers)!r} for one: give another --output"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()

    def check_same_settings(self, settings: Collection[str]) -> None:
        """Raises ValueError unless every line compares these settings."""
        if any(set(record["settings"]) != set(settings) for record in self.lines.records.values()):
            raise ValueError(f"{self.lines.path}: compares other settings: give another --output")

    def add(self, question_id: Any, tokens: list[int], comparisons: Mapping[str, Comparison]) -> None:
        """Write exact's answer to a question, and each setting's comparison with it."""
        record = {"id": question_id, "asked": self._asked[str(question_id)], "tokens": tokens}
        compared = {name: asdict(comparison) for name, comparison in comparisons.items()}
        self.lines.append([record | {"settings": compared}])


def read_comparisons(path: str) -> Comparisons:
    """What `calibrate` has written; raises ValueError or OSError if it is something else."""
    records = (validated(_RECORD, line, place(path, number)) for number, line in json_lines(path))
    return [{name: Comparison(**values) for name, values in record["settings"].items()} for record in records]
