"""Text of a PDF file, a blank line between pages.

A program: the file comes in, the text goes out as UTF-8. `documents.py` runs it. What is wrong with a file is
one line on stderr, and exit status 3.
"""

import io
import sys

from pypdf import PdfReader

MOST_PAGES = 10_000
REFUSED = 3


class RefusedFile(ValueError):
    """A file whose text cannot be had, and why."""


def text_of(file: bytes) -> str:
    """The text of a file. Raises RefusedFile; and whatever pypdf raises for a file that is broken."""
    reader = PdfReader(io.BytesIO(file))
    if reader.is_encrypted and not reader.decrypt(""):
        raise RefusedFile("the PDF is encrypted")
    if len(reader.pages) > MOST_PAGES:
        raise RefusedFile(f"the PDF has {len(reader.pages)} pages; the limit is {MOST_PAGES}")
    text = "\n\n".join(page.extract_text().strip() for page in reader.pages).strip()
    if not text:
        raise RefusedFile("the PDF has no text: are its pages pictures?")
    return text


if __name__ == "__main__":
    try:
        sys.stdout.buffer.write(text_of(sys.stdin.buffer.read()).encode(errors="replace"))
    except RefusedFile as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
