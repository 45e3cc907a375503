"""gpt-oss: messages `<|channel|>name to=recipient<|message|>text<|end|>`, one after the other.

What is in the channel `analysis` is reasoning; what is sent to `functions.NAME`, a call; the rest, content.
"""

import re

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.json_text import is_name
from megatron_star.server.tools.reader import Reader, Steps

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
FUNCTIONS, ROLE = "functions.", "assistant"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")


class Harmony(CallFormat):
    """See above. Calls are read as such where there are tools."""

    names = ("openai",)
    shape = Shape(
        f"{CHANNEL}commentary to={FUNCTIONS}",
        f" {CONSTRAIN}json{MESSAGE}",
        "",
        between=None,
        aside=(f"{CHANNEL}analysis{MESSAGE}", f"{ENDS[0]}{START}{ROLE}"),
    )
    marks = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
    has_reasoning = True

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        while (yield from self._comes(reader)) and (header := (yield from reader.head(MESSAGE))) is not None:
            reader.take()
            yield from self._message(reader, deltas, header, tools)
            reader.take()
        deltas.content(reader.take())

    def _comes(self, reader: Reader) -> Steps[bool]:
        """A header comes; its beginning is read. The prompt ends with that of the first message."""
        yield from reader.space()
        if (yield from reader.skip(START)):
            return (yield from reader.skip(ROLE))
        first = yield from reader.peek()
        return (first == "t" and (yield from self._looks_like(reader, "to="))) or (
            first == "<" and (yield from self._looks_like(reader, CHANNEL))
        )

    def _looks_like(self, reader: Reader, beginning: str) -> Steps[bool]:
        at = reader.num_read()
        comes = yield from reader.skip(beginning)
        reader.back_to(at)
        return comes

    def _message(self, reader: Reader, deltas: Deltas, header: str, tools: Tools) -> Steps[None]:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = recipient[1].removeprefix(FUNCTIONS) if recipient else ""
        if tools and recipient and recipient[1].startswith(FUNCTIONS) and is_name(name):
            deltas.call(name)
            yield from self._arguments(reader, deltas)
        elif channel and channel[1] == "analysis":
            deltas.reasoning("")
            yield from reader.until(ENDS, deltas.reasoning)
        else:
            deltas.interrupt()
            yield from reader.until(ENDS, deltas.content)

    def _arguments(self, reader: Reader, deltas: Deltas) -> Steps[None]:
        yield from reader.space()
        reader.take()
        if (yield from reader.peek()) in ("<", ""):
            deltas.arguments("{}")
        yield from reader.until(ENDS, deltas.arguments)
