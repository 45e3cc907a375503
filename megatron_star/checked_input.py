"""Text and JSON that somebody else wrote: what is wrong in it is a ValueError with the file and the place."""

import json
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

BYTE_ORDER_MARK = "\ufeff"
MOST_SHOWN = 60
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: str | Path, *, newline: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark; `newline` as `open` takes it.

    Raises:
        OSError, ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline=newline) as file:
            return file.read().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        hint = "; is it UTF-16?" if error.start < 2 and error.object[error.start] >= 0xFE else ""
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}{hint}") from error


def check_unicode(text: str, where: str) -> str:
    """The text; raises ValueError if it holds half of a surrogate pair, which no tokenizer takes."""
    found = _SURROGATE.search(text)
    if found:
        raise ValueError(
            f"{where}: {found[0]!r} at place {found.start()} is no character: half of one, or a wrong byte"
        )
    return text


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text, in which no name occurs twice, and no number is NaN or infinite.

    Raises:
        ValueError: it is something else, or nested too deeply; `where` comes first in the message.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        if _ESCAPED_SURROGATE.search(text):
            check_unicode(json.dumps(value, ensure_ascii=False), "a string")
    except RecursionError:
        raise ValueError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} occurs twice in an object")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:MOST_SHOWN]} is no finite number")
    return value


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; raises OSError or ValueError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: str | Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        advice: what to do if it cannot be read; ends the message.

    Raises:
        OSError, ValueError: as `read_json`, or it holds something else.
    """
    try:
        value = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}{advice}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {shown(value)}, not a JSON object{advice}")
    return value


def place(path: str | Path, number: int) -> str:
    """A line of a file, for messages."""
    return f"{path}, line {number}"


def json_lines(path: str | Path, *, whole_only: bool = False) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of each line of a JSON Lines file that is not empty.

    Lines end at a line feed, and nowhere else: U+2028 and its like may stand in a string. With `whole_only`,
    what stands behind the last line feed is left out: a line that a killed program did not finish.

    Raises:
        OSError, ValueError: as `read_text` and `parse_json` do.
    """
    *lines, rest = read_text(path, newline="").split("\n")
    for number, line in enumerate(lines if whole_only else [*lines, rest], 1):
        if line.strip():
            yield number, parse_json(line, place(path, number))


def strict_dictionary(of: type) -> Any:
    """The type of a dictionary with the annotated fields of a class; converts nothing, drops other keys."""
    fields = TypedDict(of.__name__, get_type_hints(of, include_extras=True))
    return with_config(ConfigDict(strict=True, allow_inf_nan=False))(fields)


def strict_fields(of: type) -> TypeAdapter[dict[str, Any]]:
    """Checks values for `strict_dictionary`."""
    return TypeAdapter(strict_dictionary(of))


def validated[T](adapter: TypeAdapter[T], value: Any, where: str) -> T:
    """The value as what the adapter describes.

    Raises:
        ValueError: it is something else; names the place, the key and its value.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        raise ValueError(f"{where}: the field {key!r} is missing")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if not key:
        raise ValueError(f"{where}: {shown(value)}: {reason}")
    raise ValueError(f"{where}: the field {key!r} is {shown(first['input'])}: {reason}")


def shown(value: object) -> str:
    """As in Python, cut: a message is one line."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or nested too deeply
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."
