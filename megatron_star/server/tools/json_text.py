"""JSON that comes in pieces, and calls that are JSON objects."""

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.reader import LONGEST_HEAD, NAME, Reader, Steps

ARGUMENTS = ("arguments", "parameters")
_STRING = re.compile(rf'"(?:[^"\\]|\\.){{0,{LONGEST_HEAD}}}"', re.DOTALL)
_STRUCTURE, _IN_STRING = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')
_SCALAR = re.compile(r"[\w+.\-]*")


def parsed(text: str) -> Any:
    """What a JSON text says. Raises ValueError if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_string(reader: Reader) -> Steps[str | None]:
    """Reads a short string; None if there is none."""
    while True:
        if match := _STRING.match(reader.text, reader.at):
            reader.at = match.end()
            return _decoded(match[0])
        left = len(reader.text) - reader.at
        if reader.ended or left > 2 * LONGEST_HEAD + 1 or (left and reader.text[reader.at] != '"'):
            return None
        yield


def _decoded(text: str) -> str | None:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None


def read_value(reader: Reader, write: Callable[[], None] | None = None) -> Steps[bool]:
    """Reads one value, by its brackets and quotes alone; False if there is none, or not its end.

    write: called whenever more of it was read.
    """
    first = yield from reader.peek()
    if not first or first not in '"{[':
        return (yield from _read_scalar(reader))
    depth, quoted = 0, False
    while True:
        match = (_IN_STRING if quoted else _STRUCTURE).search(reader.text, reader.at)
        if match and match[0] == "\\" and match.end() == len(reader.text) and not reader.ended:
            reader.at, match = match.start(), None
        elif match:
            reader.at = match.end() + (match[0] == "\\" and match.end() < len(reader.text))
            quoted ^= match[0] == '"'
            depth += (match[0] in "{[") - (match[0] in "}]")
        else:
            reader.at = len(reader.text)
        is_whole = match is not None and depth <= 0 and not quoted
        if write and (is_whole or match is None):
            write()
        if is_whole:
            return True
        if match is None:
            if reader.ended:
                return False
            yield


def _read_scalar(reader: Reader) -> Steps[bool]:
    while True:
        end = _SCALAR.match(reader.text, reader.at).end()
        if end < len(reader.text) or reader.ended:
            found, reader.at = end > reader.at, end
            return found
        yield


def read_arguments(reader: Reader, deltas: Deltas, name: str) -> Steps[bool]:
    """Reads a JSON object, which is a call's arguments; False if none begins here."""
    if (yield from reader.peek()) != "{":
        return False
    deltas.call(name)
    reader.take()
    yield from read_value(reader, lambda: deltas.arguments(reader.take()))
    return True


def read_call(reader: Reader, deltas: Deltas, names: Collection[str] | None = None) -> Steps[bool]:
    """Reads an object with `name` and `arguments` (or `parameters`); False if it is none.

    Its arguments are written as they come, from where the name is known too. What is read of something that
    is no call is not taken.

    Args:
        names: of the functions that may be called; None lets any be.
    """
    if not (yield from reader.skip("{")):
        return False
    name: str | None = None
    held: str | None = None
    while not (yield from _at_end(reader)):
        key = yield from _read_key(reader)
        if key is None:
            return False
        if key == "name":
            name = yield from read_string(reader)
            if not is_name(name) or (names is not None and name not in names):
                return False
        elif key in ARGUMENTS and name and (yield from read_arguments(reader, deltas, name)):
            yield from _read_rest(reader)
            return True
        else:
            start = reader.num_read()
            if not (yield from read_value(reader)):
                return False
            held = reader.read_from(start) if key in ARGUMENTS else held
        if not (yield from _after_value(reader)):
            return False
    arguments = _as_object("{}" if held is None else held)
    if name is None or arguments is None:
        return False
    deltas.call(name)
    deltas.arguments(arguments)
    reader.take()
    return True


def is_name(name: str | None) -> bool:
    """It may be a function's name."""
    return bool(name) and NAME.fullmatch(name) is not None


def _read_key(reader: Reader) -> Steps[str | None]:
    key = yield from read_string(reader)
    yield from reader.space()
    if key is None or not (yield from reader.skip(":")):
        return None
    yield from reader.space()
    return key


def _at_end(reader: Reader) -> Steps[bool]:
    yield from reader.space()
    return (yield from reader.skip("}"))


def _after_value(reader: Reader) -> Steps[bool]:
    """A comma is read, a closing bracket is left; False if neither comes."""
    yield from reader.space()
    return (yield from reader.skip(",")) or (yield from reader.peek()) == "}"


def _read_rest(reader: Reader) -> Steps[None]:
    """What follows the arguments in their object, as far as it is right."""
    while (yield from _after_value(reader)) and not (yield from _at_end(reader)):
        if (yield from _read_key(reader)) is None or not (yield from read_value(reader)):
            break
    reader.take()


def _as_object(text: str) -> str | None:
    """A JSON object; or a string that holds one, as some models write it; null is one without names."""
    try:
        value = parsed(text)
        if isinstance(value, str):
            text, value = value, parsed(value)
    except ValueError:
        return None
    return text if isinstance(value, dict) else "{}" if value is None else None
