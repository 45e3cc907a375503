"""Arguments that a model writes as plain texts, made to JSON by the function's schema."""

import json
from typing import Any

from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.json_text import parsed
from megatron_star.server.tools.reader import Reader, Steps

ANY = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


def types_of(schema: Any) -> frozenset[str]:
    """The types that a schema allows, as far as it says so itself."""
    if not isinstance(schema, dict):
        return ANY
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        found = map(types_of, alternatives) if isinstance(alternatives, list) else [ANY]
        return frozenset().union(*found)
    if isinstance(values := schema.get("enum"), list):
        return frozenset("string" if isinstance(value, str) else "number" for value in values)
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return frozenset(name for name in names if name in ANY) or ANY


def as_json(text: str, types: frozenset[str]) -> str:
    """A value as JSON: as it is written where that is JSON, or else a string."""
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    bare = _WORDS.get(text.strip().lower(), text.strip())
    if types == {"string", "null"} and bare != "null":
        return json.dumps(text, ensure_ascii=False)
    try:
        parsed(bare)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return bare


class ArgumentsWriter:
    """Writes one call's arguments, name by name."""

    def __init__(self, deltas: Deltas, schema: dict[str, Any]) -> None:
        properties = schema.get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        self._deltas, self._has_names = deltas, False

    def end(self) -> None:
        """No further name."""
        self._deltas.arguments("}" if self._has_names else "{}")

    def value(self, reader: Reader, name: str, marks: tuple[str, ...]) -> Steps[bool]:
        """Reads a value up to one of these marks, and the mark; a text is written as it comes.

        False if the answer ends before.
        """
        self._deltas.arguments(
            (", " if self._has_names else "{") + json.dumps(name, ensure_ascii=False) + ": "
        )
        self._has_names = True
        reader.take()
        types = types_of(self._properties.get(name))
        read = self._text(reader, marks) if types == {"string"} else self._other(reader, marks, types)
        mark = yield from read
        reader.take()
        return mark is not None

    def _text(self, reader: Reader, marks: tuple[str, ...]) -> Steps[str | None]:
        self._deltas.arguments('"')
        mark = yield from reader.until(marks, self._write_escaped)
        self._deltas.arguments('"' if mark else "")
        return mark

    def _write_escaped(self, text: str) -> None:
        self._deltas.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def _other(self, reader: Reader, marks: tuple[str, ...], types: frozenset[str]) -> Steps[str | None]:
        pieces: list[str] = []
        mark = yield from reader.until(marks, pieces.append)
        self._deltas.arguments(as_json("".join(pieces), types) if mark else "")
        return mark
