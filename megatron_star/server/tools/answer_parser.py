"""Splits answers into reasoning, calls and content, by the formats of the model that runs here."""

from dataclasses import dataclass

from megatron_star.server.tools.call_format import CallFormat, Tools
from megatron_star.server.tools.deltas import Content, Delta, Deltas
from megatron_star.server.tools.reader import Reader, Steps
from megatron_star.server.tools.reasoning import ReasoningFormat


class AnswerParser:
    """One answer's text, piece by piece. What is found does not depend on where the text is cut."""

    def __init__(self, steps: Steps[None], reader: Reader, deltas: Deltas) -> None:
        self._steps, self._reader, self._deltas = steps, reader, deltas
        next(steps, None)

    def add(self, text: str) -> list[Delta]:
        """What more of the text is."""
        if text:
            self._reader.add(text)
            next(self._steps, None)
        return self._deltas.take()

    def finish(self) -> list[Delta]:
        """What the rest is, which nothing follows."""
        self._reader.ended = True
        for _ in self._steps:
            pass
        self._deltas.end()
        return self._deltas.take()


class PlainParser:
    """An answer that is content as it is: nothing is held back."""

    def add(self, text: str) -> list[Delta]:
        """See `AnswerParser`."""
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        """See `AnswerParser`."""
        return []


@dataclass(frozen=True)
class AnswerFormats:
    """How the model writes calls and reasoning; None where it does not, or nobody wants to know."""

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None

    def parser(
        self, tools: Tools, *, most_calls: int | None = None, is_reasoning: bool = False
    ) -> AnswerParser | PlainParser:
        """Of one answer.

        Args:
            tools: that may be called; without any, what looks like a call is content.
            most_calls: further ones are left out.
            is_reasoning: the prompt ends in the middle of the answer's reasoning.
        """
        reads_calls = self.calls and (tools or self.calls.has_reasoning)
        if not reads_calls and not self.reasoning:
            return PlainParser()
        reader, deltas = Reader(), Deltas(most_calls)
        return AnswerParser(self._steps(reader, deltas, tools, is_reasoning), reader, deltas)

    def marks(self, *, with_calls: bool) -> tuple[str, ...]:
        """Texts that a parser must see though they are special tokens."""
        calls, reasoning = self.calls, self.reasoning
        wanted = calls.marks if calls and (with_calls or calls.has_reasoning) else ()
        return wanted + (reasoning.marks if reasoning else ())

    def _steps(self, reader: Reader, deltas: Deltas, tools: Tools, is_reasoning: bool) -> Steps[None]:
        if self.reasoning:
            yield from self.reasoning.parse(reader, deltas, is_open=is_reasoning)
        if self.calls and (tools or self.calls.has_reasoning):
            yield from self.calls.parse(reader, deltas, tools)
        yield from reader.until((), deltas.content)
