"""Forms with a file (multipart/form-data): taken apart in memory, within bounds, by python-multipart."""

from dataclasses import dataclass, field
from email.message import Message
from typing import NamedTuple

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from megatron_star.server.documents import UploadedFile
from megatron_star.server.errors import RequestError

MOST_PARTS = 32
MOST_FIELD_BYTES = 1 << 16
FILE = "file"


class Form(NamedTuple):
    """Texts of fields by their names, and the file of the field `file`."""

    fields: dict[str, str]
    file: UploadedFile | None


def is_form(content_type: str) -> bool:
    """A body of this type is a form with files."""
    message = Message()
    message["content-type"] = content_type
    return message.get_content_type() == "multipart/form-data"


def parsed(body: bytes, content_type: str) -> Form:
    """The parts of a form.

    Raises:
        RequestError: it is none, or has too many or too large fields, or two of a name.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError(400, "Content-Type: it has no boundary", "Content-Type")
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(400, f"the body is no form: {error}") from error
    if not collector.ended:
        raise RequestError(400, "the body is no form: its end is missing")
    return _form(collector.parts)


@dataclass
class _Part:
    """Headers, by their names in small letters, and content."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)


class _Collector:
    """What the parser finds."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.ended = False

    def callbacks(self) -> dict:
        """As the parser calls them."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self.parts[-1].content.extend(data[start:end]),
            "on_header_field": lambda data, start, end: self.parts[-1].header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self.parts[-1].value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise RequestError(400, f"the form has more than {MOST_PARTS} fields")
        self.parts.append(_Part())

    def _end_header(self) -> None:
        part = self.parts[-1]
        part.headers[bytes(part.header).lower()] = bytes(part.value)
        part.header, part.value = bytearray(), bytearray()

    def _end(self) -> None:
        self.ended = True


def _form(parts: list[_Part]) -> Form:
    fields: dict[str, str] = {}
    file = None
    for part in parts:
        options = parse_options_header(part.headers.get(b"content-disposition", b""))[1]
        name = options.get(b"name", b"").decode(errors="replace")
        if name in fields or (name == FILE and file):
            raise RequestError(400, f"{name[:100]}: the form has it twice", name[:100])
        if name == FILE:
            filename = options.get(b"filename", b"").decode(errors="replace")
            content_type = part.headers.get(b"content-type", b"").decode("latin-1")
            file = UploadedFile(bytes(part.content), filename, content_type)
        else:
            fields[name] = _text(name, part.content)
    return Form(fields, file)


def _text(name: str, content: bytearray) -> str:
    if len(content) > MOST_FIELD_BYTES:
        message = f"{name[:100]}: it has {len(content)} bytes; the limit is {MOST_FIELD_BYTES}"
        raise RequestError(400, message, name[:100])
    try:
        return content.decode()
    except UnicodeError as error:
        raise RequestError(400, f"{name[:100]}: it is no UTF-8 text", name[:100]) from error
