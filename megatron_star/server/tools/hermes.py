"""Hermes, Qwen 2.5 and 3, and many others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.json_text import read_call
from megatron_star.server.tools.reader import Reader, Steps

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(CallFormat):
    """See above."""

    names = ("hermes",)
    shape = Shape(f'{BEGIN}\n{{"name": "', '", "arguments": ', f"}}\n{END}", between="\n")
    marks = (BEGIN, END)

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        while (yield from reader.until((BEGIN,), deltas.content)):
            yield from reader.space()
            if (yield from read_call(reader, deltas)):
                yield from reader.space()
                yield from reader.skip(END)
                reader.take()
            deltas.content(reader.take())
