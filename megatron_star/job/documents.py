"""Documents and questions of a user, from files. Only the driver reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import AfterValidator, ConfigDict, TypeAdapter, with_config

from megatron_star.checked_input import check_unicode, json_lines, place, read_text, validated


@dataclass(frozen=True)
class Document:
    """A context and a question about it."""

    id: str | int
    context: str
    query: str


def _id(value: Any) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise ValueError("it must be a string or a whole number")
    return value


def _query(text: str) -> str:
    if not text.strip():
        raise ValueError("it needs at least one word")
    return text


@with_config(ConfigDict(strict=True))
class _Line(TypedDict):
    context: str
    query: Annotated[str, AfterValidator(_query)]
    id: NotRequired[Annotated[Any, AfterValidator(_id)]]


_LINE: TypeAdapter[Mapping[str, Any]] = TypeAdapter(_Line)


def read_document(context_file: str, query: str | None, query_file: str | None) -> Document:
    """One document from files.

    Raises:
        OSError, ValueError: a file cannot be read, or is not UTF-8; or the query is empty.
    """
    text, where = (query, "--query") if query_file is None else (read_text(query_file), query_file)
    if not check_unicode(text, where).strip():
        raise ValueError(f"{where}: the query is empty: it needs at least one word")
    return Document("0", read_text(context_file), text)


def read_jsonl(path: str) -> list[Document]:
    """One document a line, with `context`, `query` and, optionally, `id`; other fields are left alone.

    An id is a string or a whole number; without one, or with null, it is the line's number from 0.

    Raises:
        OSError, ValueError: with the line's number.
    """
    documents: dict[str, Document] = {}
    for number, value in json_lines(path):
        where = place(path, number)
        line = validated(_LINE, value, where)
        name = line.get("id")
        if name is None:
            name = str(number - 1)
        if str(name) in documents:
            raise ValueError(f"{where}: the id {name!r} occurs twice")
        documents[str(name)] = Document(name, line["context"], line["query"])
    return list(documents.values())
