"""What a format of calls consists of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.reader import Reader, Steps

Tools = Mapping[str, dict[str, Any]]
"""Functions that may be called: the JSON schema of the arguments, by name."""


class Shape(NamedTuple):
    """How a call is written that is asked for: `begin name after_name arguments end`.

    Attributes:
        argument: what stands before a name, between it and its value, and after that; None where the
            arguments are a JSON object.
        between: two calls; None where an answer has one only.
        all_begin, all_end: around all calls.
        aside: what may come before: reasoning, between two of these texts.
    """

    begin: str
    after_name: str
    end: str
    argument: tuple[str, str, str] | None = None
    between: str | None = ""
    all_begin: str = ""
    all_end: str = ""
    aside: tuple[str, str] | None = None


class CallFormat(ABC):
    """How a family of models writes calls of functions. It has no state.

    Attributes:
        names: on the command line; the first is the format's own.
        shape: of a call that is asked for.
        marks: texts of the format that are special tokens in some vocabularies.
        has_reasoning: it says too what is reasoning.
        id_length: of calls, where a chat template takes only letters and digits, so many; None elsewhere.
    """

    names: tuple[str, ...]
    shape: Shape
    marks: tuple[str, ...] = ()
    has_reasoning = False
    id_length: int | None = None

    @abstractmethod
    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """Reads an answer to its end. What is no call is content, with the marks around it."""
