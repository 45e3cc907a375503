"""Input and output files of generate.py. Only the driver reads and writes them."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_star.inference.request import StarResult


@dataclass(frozen=True)
class Document:
    """A context and a question about it."""

    id: str
    context: str
    query: str


def read_document(context_file: str, query: str | None, query_file: str | None) -> Document:
    """One document from files.

    Raises:
        OSError, ValueError: a file cannot be read, or is not UTF-8.
    """
    text = query if query_file is None else _read_text(query_file)
    return Document("0", _read_text(context_file), text or "")


def read_jsonl(path: str) -> list[Document]:
    """One document a line, with `context`, `query` and, optionally, `id`; other fields are left alone.

    Raises:
        OSError, ValueError: with the line's number.
    """
    documents = [
        _document(line, f"{path}, line {number}", str(number - 1))
        for number, line in enumerate(_read_text(path).splitlines(), 1)
        if line.strip()
    ]
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise ValueError(f"{path}: the id {document.id!r} occurs twice")
        seen.add(document.id)
    return documents


def _document(line: str, where: str, default_id: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    for field in ("context", "query"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{where}: the field {field!r} is missing or not a string")
    return Document(str(record.get("id", default_id)), record["context"], record["query"])


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def write_json(path: str, result: StarResult) -> None:
    """Write one answer, all of it or nothing."""
    temporary = Path(f"{path}.partial")
    temporary.write_text(json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def finished_ids(path: str) -> set[str]:
    """Ids of the answers that an earlier run left in a JSON Lines file; a torn last line is cut off."""
    if not Path(path).exists():
        return set()
    with open(path, "r+b") as file:
        content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        file.truncate(len(complete))
    try:
        return {json.loads(line)["id"] for line in complete.splitlines()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: exists, but its lines are not answers of this program") from error


def append_jsonl(path: str, answers: Iterable[tuple[Document, StarResult]]) -> None:
    """Add answers to a JSON Lines file, each with its document's id."""
    append_lines(path, ({"id": document.id} | asdict(result) for document, result in answers))


def append_lines(path: str, records: Iterable[dict[str, Any]]) -> None:
    """Add objects to a JSON Lines file; they are on the disk when this returns."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
