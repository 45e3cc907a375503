"""Text of an HTML page: what a person reads of it, a line for each block, a blank line between paragraphs.

A program: characters of the page come in as UTF-8, those of the text go out so. `documents.py` runs it.
"""

import re
import sys

from bs4 import BeautifulSoup, NavigableString, Tag

UNREAD = frozenset(("head", "script", "style", "template", "noscript", "svg", "math", "iframe", "object"))
PARAGRAPHS = frozenset(
    ("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "section")
    + ("article", "header", "footer", "main", "nav", "aside", "figure", "form", "hr", "body")
)
LINES = frozenset(("div", "li", "dt", "dd", "tr", "caption", "figcaption", "address", "option", "title"))
CELLS = frozenset(("td", "th"))
BLOCKS = PARAGRAPHS | LINES | CELLS


def text_of(page: str) -> str:
    """The text of a page."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", "".join(_pieces(page)))).strip()


def _pieces(page: str) -> list[str]:
    """Texts and what stands between them. In the order of the page: a block's parent is seen before it."""
    soup = BeautifulSoup(page, "html.parser")
    block_of, paragraph_of, unread, kept = {id(soup): soup}, {id(soup): soup}, set(), set()
    pieces, last = [], soup
    for node in soup.descendants:
        parent = id(node.parent)
        if isinstance(node, Tag):
            block_of[id(node)] = node if node.name in BLOCKS else block_of[parent]
            paragraph_of[id(node)] = node if node.name in PARAGRAPHS else paragraph_of[parent]
            if node.name in UNREAD or parent in unread:
                unread.add(id(node))
            if node.name in ("pre", "textarea") or parent in kept:
                kept.add(id(node))
            if node.name == "br":
                pieces.append("\n")
        elif type(node) is NavigableString and parent not in unread:
            text = str(node) if parent in kept else re.sub(r"\s+", " ", node)
            block = block_of[parent]
            if block is not last and text.strip():
                same_paragraph = paragraph_of[id(last)] is paragraph_of[id(block)]
                pieces.append(_between(last, block) if same_paragraph else "\n\n")
                last = block
            begins_line = pieces and pieces[-1].endswith("\n")
            pieces.append(text.lstrip() if begins_line and parent not in kept else text)
    return pieces


def _between(before: Tag, after: Tag) -> str:
    """What separates texts of two blocks of a paragraph."""
    is_row = before.name in CELLS and after.name in CELLS and before.parent is after.parent
    return " | " if is_row else "\n"


if __name__ == "__main__":
    sys.stdout.buffer.write(text_of(sys.stdin.buffer.read().decode()).encode())
