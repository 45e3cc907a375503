"""What an answer consists of, piece by piece."""

from typing import NamedTuple


class Content(NamedTuple):
    """Text for whoever asked."""

    text: str


class Reasoning(NamedTuple):
    """Text that the model wrote for itself."""

    text: str


class Call(NamedTuple):
    """A call of this function begins; its arguments follow."""

    name: str


class Arguments(NamedTuple):
    """More of the last call's arguments, which are a JSON text."""

    text: str


Delta = Content | Reasoning | Call | Arguments


class Deltas:
    """Collects them. White space waits for what follows it: beside a call or reasoning, it is nothing.

    Attributes:
        num_calls: that have begun.
    """

    def __init__(self, most_calls: int | None = None) -> None:
        """most_calls: further ones are left out."""
        self.num_calls, self._most_calls = 0, most_calls
        self._found: list[Delta] = []
        self._space = self._reasoning_space = ""
        self._has_content = self._has_reasoning = False
        self._break: str | None = None

    def take(self) -> list[Delta]:
        """Those that were not taken yet."""
        found, self._found = self._found, []
        return found

    def content(self, text: str) -> None:
        """More of the content."""
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if self._break is not None and (said := said.lstrip()):
            said, self._break = self._break + said, None
        if said:
            self._has_content = True
            self._put(Content(said))

    def interrupt(self) -> None:
        """The content ends here; what may follow stands on a line of its own."""
        self._space, self._break = "", "\n" if self._has_content else ""

    def reasoning(self, text: str) -> None:
        """More of the reasoning, which may be nothing."""
        self.interrupt()
        text = self._reasoning_space + text
        said = text.rstrip()
        self._reasoning_space = text[len(said) :]
        if not self._has_reasoning:
            said = said.lstrip()
        if said:
            self._has_reasoning = True
            self._put(Reasoning(said))

    def call(self, name: str) -> None:
        """Another call."""
        self.interrupt()
        self.num_calls += 1
        if self._takes_call:
            self._found.append(Call(name))

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text and self._takes_call:
            self._put(Arguments(text))

    def end(self) -> None:
        """Nothing follows."""
        if self._space and self._break is None:
            self._put(Content(self._space))

    def _put(self, delta: Content | Reasoning | Arguments) -> None:
        """One with what comes before it, where that is of its kind."""
        if self._found and type(self._found[-1]) is type(delta):
            delta = type(delta)(self._found.pop().text + delta.text)
        self._found.append(delta)

    @property
    def _takes_call(self) -> bool:
        return self._most_calls is None or self.num_calls <= self._most_calls
