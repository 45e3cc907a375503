"""Files to text: what is read of each kind, what is refused by name, and that no file takes too much."""

import codecs
import re
import sys

import pytest
from documents import PAGE, TEXT_OF_PAGE, pdf

from megatron_star.config import FieldError
from megatron_star.server import documents
from megatron_star.server.documents import UploadedFile, text_of

GREETING = "Grüße, 漢字 and 🦙"


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c", "d.py"])
def test_text_is_taken_as_it_is(name):
    assert text_of(UploadedFile(f"# Title\n\n{GREETING}".encode(), name)) == f"# Title\n\n{GREETING}"


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (codecs.BOM_UTF8 + GREETING.encode(), ""),
        (codecs.BOM_UTF16_LE + GREETING.encode("utf-16-le"), "text/plain; charset=latin-1"),
        (codecs.BOM_UTF32_BE + GREETING.encode("utf-32-be"), "application/octet-stream"),
        (GREETING.encode("gb18030"), "text/plain; charset=GB18030"),
        (GREETING.encode("utf-16"), 'text/markdown; charset="utf-16"'),
    ],
)
def test_the_mark_at_its_beginning_or_what_its_type_says_decides_on_the_charset(content, content_type):
    assert text_of(UploadedFile(content, "a.txt", content_type)) == GREETING


def test_of_a_page_what_a_person_reads_is_left():
    assert text_of(UploadedFile(PAGE.encode(), "page.HTML")) == TEXT_OF_PAGE
    assert text_of(UploadedFile(PAGE.encode(), "", "text/html; charset=utf-8")) == TEXT_OF_PAGE
    said = '<meta charset="iso-8859-1"><p>' + "Grüße"
    assert text_of(UploadedFile(said.encode("latin-1"), "a.htm")) == "Grüße"


def test_of_a_pdf_file_the_pages_are_paragraphs():
    assert text_of(UploadedFile(pdf("Anna lives in Lisbon.", "Karl in Oslo."), "a.txt")) == (
        "Anna lives in Lisbon.\n\nKarl in Oslo."
    )


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (UploadedFile(b"Gr\xfc\xdfe"), "byte 2 is no utf-8 text"),
        (UploadedFile(codecs.BOM_UTF16_LE + b"abc"), "is no utf-16-le text"),
        (UploadedFile(b"a\0b"), "character 1 is NUL"),
        (UploadedFile(b"a", "a.txt", "text/plain; charset=punycode"), "charset 'punycode' is not known"),
        (UploadedFile(b"a", "a.txt", "text/plain; charset=no-such"), "charset 'no-such' is not known"),
        (UploadedFile(b"a", "a.txt", "text/plain; charset=bz2"), "charset 'bz2' is not known"),
        (UploadedFile(b"%PDF-1.7 and no more"), "the PDF file is broken"),
        (UploadedFile(pdf("a")[:300]), "the PDF"),
        (UploadedFile(pdf("", "")), "the PDF has no text: are its pages pictures"),
    ],
)
def test_what_cannot_be_read_is_refused_and_why(file, reason):
    with pytest.raises(FieldError, match=re.escape(f"file: {reason}"[:6])) as error:
        text_of(file)
    assert reason in str(error.value) and error.value.field == "file"


def test_without_the_library_for_pdf_files_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(FieldError, match=re.escape("pip install 'megatron-star[documents]'")):
        text_of(UploadedFile(pdf("a")))


def test_a_file_that_takes_too_long_or_is_made_to_expand_is_refused(monkeypatch):
    monkeypatch.setattr(documents, "MOST_SECONDS_OF_A_READER", 2)
    slow = b"<p>hi</p>" * 500_000
    with pytest.raises(FieldError, match="takes more than 2 s to read"):
        text_of(UploadedFile(slow, "a.html"))
    bomb = pdf("a", content=b"BT (a) Tj ET " * (32 << 20 >> 3))
    assert len(bomb) < 1 << 20
    with pytest.raises(FieldError, match="takes more than|is broken"):
        text_of(UploadedFile(bomb))


def test_a_file_that_takes_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(documents, "MOST_BYTES_OF_A_READER", 100 << 20)
    with pytest.raises(FieldError, match="takes more than 104,857,600 bytes to read"):
        text_of(UploadedFile(b"<p>" + b"hi <b>there</b>" * 200_000, "a.html"))


def test_a_page_of_a_hundred_thousand_levels_is_read():
    assert text_of(UploadedFile(b"<div>" * 100_000 + b"deep", "a.html")) == "deep"
