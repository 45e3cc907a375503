"""From an uploaded file to its text: plain text and Markdown as they are, HTML and PDF by libraries.

A library reads what a stranger wrote in a process of its own, with bounds on its memory, its seconds and its
text, one file at a time: a file that is made to expand costs its sender a refusal, and nobody else an answer.
"""

import asyncio
import codecs
import importlib.util
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath

from megatron_star.config import FieldError

READERS = Path(__file__).parent / "readers"
MOST_BYTES_OF_A_READER = 2 << 30
"""Of addresses, of which a process needs 0.2 GiB before it has read anything."""
MOST_SECONDS_OF_A_READER = 60
NICENESS = 10
"""Answers come first."""
MOST_TEXT_BYTES = 64 << 20
REFUSED = 3
"""Exit status of a reader that says why."""
HTML_TYPES, HTML_SUFFIXES = ("text/html", "application/xhtml+xml"), (".html", ".htm", ".xhtml")
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CHARSETS = frozenset(
    ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "ascii", "koi8-r", "koi8-u", "mac-roman")
    + ("gb2312", "gbk", "gb18030", "big5", "shift_jis", "euc_jp", "iso2022_jp", "euc_kr", "cp949", "tis-620")
    + tuple(f"iso8859-{part}" for part in range(1, 17))
    + tuple(f"cp{page}" for page in (437, 850, 852, 866, 874, 932, *range(1250, 1259)))
)
"""By Python's names. Others that it knows are no encodings of documents; to decode some takes very long."""
_META_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s{0,8}=\s{0,8}["']?\s{0,8}([\w-]{1,40})""", re.I)
BYTES_BEFORE_A_META = 1024


@dataclass(frozen=True)
class UploadedFile:
    """A file as a form has it: its name and what the sender calls its type."""

    content: bytes
    name: str = ""
    content_type: str = ""

    @property
    def is_pdf(self) -> bool:
        """What it begins with decides."""
        return b"%PDF-" in self.content[:1024]

    @property
    def is_html(self) -> bool:
        """Its type, or the end of its name."""
        return self._message.get_content_type() in HTML_TYPES or (
            PurePosixPath(self.name.lower()).suffix in HTML_SUFFIXES
        )

    @property
    def declared_charset(self) -> str | None:
        """In the type, or in the first bytes of an HTML page."""
        charset = self._message.get_content_charset()
        if charset or not self.is_html:
            return charset
        found = _META_CHARSET.search(self.content, 0, BYTES_BEFORE_A_META)
        return found and found[1].decode("latin-1")

    @property
    def _message(self) -> Message:
        message = Message()
        message["content-type"] = self.content_type or "text/plain"
        return message


class DocumentReader:
    """Makes texts of files, in a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "document")

    async def text(self, file: UploadedFile) -> str:
        """The text of a file; see `text_of`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, text_of, file)


def text_of(file: UploadedFile) -> str:
    """The text of a file.

    Raises:
        FieldError: it cannot be read, and why.
    """
    if file.is_pdf:
        if importlib.util.find_spec("pypdf") is None:
            raise _refused("to read PDF files, the server needs: pip install 'megatron-star[documents]'")
        return _read("pdf_text.py", file.content, "PDF")
    text = decoded(file)
    return _read("html_text.py", text.encode(), "HTML") if file.is_html else text


def decoded(file: UploadedFile) -> str:
    """The characters of a file of text: by its byte order mark, by what it says of itself, or else as UTF-8.

    Raises:
        FieldError: they are not what that says, or it is no text.
    """
    mark, charset = next((row for row in MARKS if file.content.startswith(row[0])), (b"", None))
    charset = charset or _charset(file.declared_charset)
    try:
        text = file.content[len(mark) :].decode(charset)
    except UnicodeError as error:
        reason = getattr(error, "reason", "it cannot be decoded")
        at = getattr(error, "start", 0) + len(mark)
        raise _refused(f"byte {at} is no {charset} text ({reason}): give the charset, or a PDF") from error
    if "\0" in text:
        raise _refused(f"character {text.index(chr(0))} is NUL: it is neither text nor HTML nor PDF")
    return text


def _charset(declared: str | None) -> str:
    if declared is None:
        return "utf-8"
    try:
        name = codecs.lookup(declared).name
    except (LookupError, ValueError):
        name = ""
    if name not in CHARSETS:
        raise _refused(f"the charset {declared[:40]!r} is not known: save it as UTF-8")
    return name


def _read(program: str, content: bytes, kind: str) -> str:
    """What a reader makes of a file's bytes."""
    command = [sys.executable, "-P", "-X", "utf8", str(READERS / program)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
    ) as reader:
        try:
            _limit(reader.pid)
            text, complaint = reader.communicate(content, timeout=2 * MOST_SECONDS_OF_A_READER)
        except subprocess.TimeoutExpired:
            reader.kill()
            raise _refused(f"the {kind} file takes more than {MOST_SECONDS_OF_A_READER} s to read") from None
        except BaseException:
            reader.kill()
            raise
    return _text_read(reader.returncode, text, complaint, kind)


def _limit(pid: int) -> None:
    """Before anything of the file is handed over."""
    limits = {
        resource.RLIMIT_AS: MOST_BYTES_OF_A_READER,
        resource.RLIMIT_CPU: MOST_SECONDS_OF_A_READER,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.prlimit(pid, limit, (most, most))
    os.setpriority(os.PRIO_PROCESS, pid, NICENESS)


def _text_read(status: int, text: bytes, complaint: bytes, kind: str) -> str:
    """What of a reader's output is the text; of its complaints, only what was written for people is told."""
    if status == REFUSED:
        raise _refused(complaint.decode(errors="replace").strip())
    if status < 0:
        raise _refused(f"the {kind} file takes more than {MOST_SECONDS_OF_A_READER} s to read")
    if b"MemoryError" in complaint:
        raise _refused(f"the {kind} file takes more than {MOST_BYTES_OF_A_READER:,} bytes to read")
    if status:
        raise _refused(f"the {kind} file is broken: it cannot be read")
    if len(text) > MOST_TEXT_BYTES:
        raise _refused(f"its text has {len(text):,} bytes; the limit is {MOST_TEXT_BYTES:,}")
    return text.decode()


def _refused(reason: str) -> FieldError:
    return FieldError(f"file: {reason}", "file")
