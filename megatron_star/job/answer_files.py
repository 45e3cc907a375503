"""Answers in a file: one that is replaced, or lines to which a later run adds what is missing."""

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_star.checked_input import parse_json, validated
from megatron_star.job.output_file import OTHER_OUTPUT, PROGRAM, Inputs, OutputFile

MOST_SHOWN = 60

Adapter = TypeAdapter[dict[str, Any]]


class AnswerFile(OutputFile):
    """One answer, as a JSON object; an earlier answer of this program is replaced."""

    def __init__(self, path: str, program: str, inputs: Inputs) -> None:
        """Raises ValueError or OSError, also if the file holds anything but an answer of this program."""
        super().__init__(path, program, inputs)
        try:
            self._check_ours()
        except BaseException:
            self.close()
            raise

    def _check_ours(self) -> None:
        if content := self._content():
            _decoded(content, self.program, self.path)
        folder = Path(self.path).resolve().parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """All of it or nothing."""
        target = Path(self.path).resolve()
        temporary = target.with_name(f".{os.getpid()}.partial")
        try:
            mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:
                file.write(self._encoded(record, indent=2))
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, self.path) from error
        self._made_here = False


class AnswerLines(OutputFile):
    """Answers as JSON Lines, each with its `id` and what was `asked`; a later run adds what is missing.

    Attributes:
        records: those that are there, as `record` describes them, by their ids.
    """

    def __init__(self, path: str, program: str, record: Adapter, inputs: Inputs) -> None:
        """
        Args:
            record: what a line must have to be of this program: at least `id` and `asked`.

        Raises:
            ValueError, OSError: as `OutputFile`; or a line is of something else. Nothing is changed then.
        """
        super().__init__(path, program, inputs)
        try:
            self.records = self._read(record)
        except BaseException:
            self.close()
            raise

    def _read(self, adapter: Adapter) -> dict[str, dict[str, Any]]:
        *lines, rest = self._content().split(b"\n")
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, 1):
            self._add(records, line, number, adapter)
        self._torn, self._first = 0, b""
        try:
            if rest:
                self._add(records, rest, len(lines) + 1, adapter)
                self._first = b"\n"  # whole, but for the end of its line
        except ValueError:
            if not self._begins_as_ours(rest, after_others=bool(lines)):
                raise
            self._torn = len(rest)
        return records

    def _add(
        self,
        records: dict[str, dict[str, Any]],
        line: bytes,
        number: int,
        adapter: Adapter,
    ) -> None:
        where = f"{self.path}, line {number}"
        record = validated(adapter, _decoded(line, self.program, where), where)
        if str(record["id"]) in records:
            raise ValueError(f"{where}: the answer {record['id']!r} occurs twice")
        records[str(record["id"])] = record

    def _begins_as_ours(self, rest: bytes, *, after_others: bool) -> bool:
        """Whether this can be a line of ours that was torn; a bare beginning only behind whole ones."""
        beginning = json.dumps({PROGRAM: self.program})[:-1].encode()
        return rest.startswith(beginning) or (after_others and beginning.startswith(rest))

    def finished(self, asked: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Which of these are answered.

        Args:
            asked: what is asked now, by id, in a form that survives JSON.

        Raises:
            ValueError: an answer with one of these ids is to something else.
        """
        there = [name for name in asked if name in self.records]
        for name in there:
            check_asked_the_same(self.records[name]["asked"], asked[name], f"{self.path}: {name!r}")
        return set(there)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add answers, behind the last whole one; they are on the disk when this returns."""
        lines = self._first + b"".join(map(self._encoded, records))
        end = os.fstat(self._descriptor).st_size - self._torn
        try:
            os.ftruncate(self._descriptor, end)
            self._torn, self._first = 0, b""
            while lines:
                lines = lines[os.write(self._descriptor, lines) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise OSError(error.errno, error.strerror, self.path) from error


def check_asked_the_same(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises ValueError that names the first difference between two questions."""
    for key in {**now, **then}:
        if then.get(key) != now.get(key):
            values = f"{_shown(then.get(key))}, now {_shown(now.get(key))}"
            raise ValueError(f"{where} was asked with another {key} ({values}): {OTHER_OUTPUT}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _decoded(content: bytes, program: str, where: str) -> dict[str, Any]:
    """An object that this program wrote; raises ValueError if it is something else."""
    try:
        record = parse_json(content.decode(), where)
    except ValueError as error:
        raise ValueError(f"{where}: {_not_ours(program)}") from error
    if not isinstance(record, dict) or record.get(PROGRAM) != program:
        raise ValueError(f"{where}: {_not_ours(program)}")
    return record


def _not_ours(program: str) -> str:
    return f"not written by this version of megatron-star {program}: {OTHER_OUTPUT}"
