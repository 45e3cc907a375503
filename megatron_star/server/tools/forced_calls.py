"""The grammar of an answer that must be a call, or several: Lark as llguidance reads it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_star.server.tools.call_format import Shape, Tools
from megatron_star.server.tools.typed_values import types_of

MOST_CALLS = 16
"""In one answer: a small model would go on without end."""
DEFINITIONS = ("$defs", "definitions")
AS_TEMPLATES_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models saw it in calls; more white space would be an endless text to some."""


def forced_calls(shape: Shape, tools: Tools, most_calls: int | None, special: Mapping[str, int]) -> str:
    """A grammar of one call or more of these tools.

    Args:
        most_calls: as in an `Offer`.
        special: ids of the special tokens of the vocabulary, by their text.
    """
    writer = _Writer(special)
    calls = " | ".join(f"call{index}" for index in range(len(tools)))
    most = min(most_calls or MOST_CALLS, MOST_CALLS)
    more = f"({writer.literal(shape.between)} call){{0,{most - 1}}}" if shape.between is not None else ""
    start = [writer.literal(shape.all_begin), "call", more if most > 1 else "", writer.literal(shape.all_end)]
    rules = [f"start: {writer.aside(shape)} {' '.join(start)}", f"call: {calls}"]
    for index, (name, schema) in enumerate(tools.items()):
        arguments = writer.arguments(shape, schema)
        call = [writer.literal(shape.begin + name + shape.after_name), arguments, writer.literal(shape.end)]
        rules.append(f"call{index}: {' '.join(call)}")
    return "\n".join([*rules, *writer.rules, ""])


class _Writer:
    """Writes parts of rules, and collects further rules that these name."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self._special = special
        marks = sorted(special, key=len, reverse=True)
        self._mark = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def literal(self, text: str) -> str:
        """This text, in which special tokens are tokens."""
        parts = self._mark.split(text) if self._mark else [text]
        return " ".join(self._part(part) for part in parts if part)

    def _part(self, text: str) -> str:
        return f"<[{self._special[text]}]>" if text in self._special else _quoted(text)

    def aside(self, shape: Shape) -> str:
        """What may come before the calls."""
        if shape.aside is None:
            return ""
        begin, end = shape.aside
        return f"({self.literal(begin)} {self.text_before(end)})?"

    def text_before(self, end: str) -> str:
        """Any text, and the first of these ends."""
        mark = next((mark for mark in self._special if end.startswith(mark)), None)
        name = f"text{len(self.rules)}"
        if mark:  # which no text has
            self.rules.append(f"{name.upper()}: /(?s:.*)/")
            return f"{name.upper()} {self.literal(end)}"
        self.rules.append(f"{name}[suffix={_quoted(end)}]: /(?s:.*)/")
        return name

    def arguments(self, shape: Shape, schema: dict[str, Any]) -> str:
        """Those that a function's schema allows."""
        schema = _of_arguments(schema)
        if shape.argument is None:
            return _json(schema)
        required = schema.get("required", [])
        return " ".join(
            f"({self._argument(shape.argument, name, value, schema)}){'' if name in required else '?'}"
            for name, value in _properties(schema)
        )

    def _argument(self, marks: tuple[str, str, str], name: str, value: Any, schema: dict[str, Any]) -> str:
        before, between, after = marks
        return f"{self.literal(before + name + between)} {self._value(value, schema, after)}"

    def _value(self, value: Any, schema: dict[str, Any], after: str) -> str:
        values = value.get("enum") if isinstance(value, dict) else None
        if types_of(value) == {"string"} and values:
            texts = [value for value in values if isinstance(value, str)]
            return f"({' | '.join(map(_quoted, texts))}) {self.literal(after)}"
        if "string" in types_of(value) and types_of(value) <= {"string", "null"}:
            return self.text_before(after)
        named = {key: schema[key] for key in DEFINITIONS if key in schema}
        return f"{_json((value if isinstance(value, dict) else {}) | named)} {self.literal(after)}"


def _of_arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has no names beside those it knows, unless it says so."""
    closed = {} if "additionalProperties" in schema or "$ref" in schema else {"additionalProperties": False}
    return schema | {"type": "object"} | closed


def _properties(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    properties = schema.get("properties")
    yield from properties.items() if isinstance(properties, dict) else ()


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({'x-guidance': AS_TEMPLATES_WRITE} | schema)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
