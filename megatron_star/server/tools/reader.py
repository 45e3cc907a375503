"""Reads a text that comes in pieces, so that what is found does not depend on where it was cut.

The methods that return `Steps` are generators: `yield from` them in a parser. They stop at a bare `yield`
where what is there does not decide yet, and go on when there is more, or the end.
"""

import re
from collections.abc import Callable, Generator, Sequence

type Steps[T] = Generator[None, None, T]
LONGEST_NAME = 128
LONGEST_HEAD = 512
NAME = re.compile(r"[A-Za-z0-9_.\-]*")
"""Of a function."""
_SPACE = re.compile(r"\s*")


class Reader:
    """A text with a position.

    Attributes:
        text: what is kept of it.
        at: the position; all before it has been read.
        ended: there is no more than `text`.
    """

    def __init__(self) -> None:
        self.text, self.at, self.ended, self._begin = "", 0, False, 0

    def add(self, text: str) -> None:
        """More of it; drops what was taken."""
        self.text = self.text[self._begin :] + text
        self.at -= self._begin
        self._begin = 0

    def take(self) -> str:
        """What was read since this was last called."""
        taken = self.text[self._begin : self.at]
        self._begin = self.at
        return taken

    def num_read(self) -> int:
        """Characters that were read and not taken."""
        return self.at - self._begin

    def back_to(self, num_read: int) -> None:
        """As if only so many had been read."""
        self.at = self._begin + num_read

    def read_from(self, num_read: int) -> str:
        """What was read since there were so many."""
        return self.text[self._begin + num_read : self.at]

    def peek(self) -> Steps[str]:
        """The next character; nothing at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def skip(self, literal: str) -> Steps[bool]:
        """Whether this comes next; it is then read."""
        while True:
            there = self.text[self.at : self.at + len(literal)]
            if there == literal:
                self.at += len(literal)
                return True
            if self.ended or not literal.startswith(there):
                return False
            yield

    def space(self) -> Steps[None]:
        """Reads white space."""
        yield from self._run(_SPACE, None)

    def name(self) -> Steps[str | None]:
        """Reads the name of a function; None if there is none."""
        return (yield from self._run(NAME, LONGEST_NAME)) or None

    def head(self, mark: str) -> Steps[str | None]:
        """Reads up to a mark that comes soon, and the mark; None if it does not."""
        while True:
            end = self.text.find(mark, self.at, self.at + LONGEST_HEAD + len(mark))
            if end >= 0:
                found, self.at = self.text[self.at : end], end + len(mark)
                return found
            if self.ended or len(self.text) - self.at >= LONGEST_HEAD + len(mark):
                return None
            yield

    def until(self, marks: Sequence[str], write: Callable[[str], None]) -> Steps[str | None]:
        """Takes and writes what comes before the first of these marks; None if none comes.

        The mark is read, but not taken. None of them is the beginning of another.
        """
        pattern = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        while True:
            if match := pattern.search(self.text, self.at):
                self.at = match.start()
                write(self.take())
                self.at = match.end()
                return match[0]
            self.at = len(self.text) if self.ended else len(self.text) - self._num_held(marks)
            write(self.take())
            if self.ended:
                return None
            yield

    def _num_held(self, marks: Sequence[str]) -> int:
        """Characters at the end that may be the beginning of a mark."""
        longest = min(max(map(len, marks), default=1) - 1, len(self.text) - self.at)
        return next(
            (n for n in range(longest, 0, -1) if any(mark.startswith(self.text[-n:]) for mark in marks)), 0
        )

    def _run(self, pattern: re.Pattern[str], most: int | None) -> Steps[str]:
        """Reads as much as matches; nothing if that is more than `most`."""
        while True:
            end = pattern.match(self.text, self.at).end()
            if most is not None and end - self.at > most:
                return ""
            if end < len(self.text) or self.ended:
                found, self.at = self.text[self.at : end], end
                return found
            yield
