"""Qwen3-Coder: `<tool_call><function=name>`, then `<parameter=key>` .. `</parameter>` for each."""

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.reader import Reader, Steps
from megatron_star.server.tools.typed_values import ArgumentsWriter

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
VALUE_ENDS = ("\n" + PARAMETER_END, PARAMETER_END)
"""The line break before the mark is the format's, as is the one after the key."""


class QwenCoder(CallFormat):
    """See above. The outer mark may be missing."""

    names = ("qwen3_coder", "qwen3_xml")
    shape = Shape(
        f"{BEGIN}\n{FUNCTION}",
        ">\n",
        f"{FUNCTION_END}\n{END}",
        (PARAMETER, ">\n", f"\n{PARAMETER_END}\n"),
        between="\n",
    )
    marks = (BEGIN, END)

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        while mark := (yield from reader.until((BEGIN, FUNCTION), deltas.content)):
            if mark == BEGIN:
                yield from reader.space()
            if mark == FUNCTION or (yield from reader.skip(FUNCTION)):
                yield from self._call(reader, deltas, tools)
            deltas.content(reader.take())

    def _call(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        name = yield from reader.name()
        if not name or not (yield from reader.skip(">")):
            return
        yield from reader.space()
        has_names = yield from reader.skip(PARAMETER)
        if not has_names and not (yield from reader.skip(FUNCTION_END)):
            return
        deltas.call(name)
        reader.take()
        writer = ArgumentsWriter(deltas, tools.get(name, {}))
        while has_names and (key := (yield from reader.head(">"))):
            yield from reader.skip("\n")
            if not (yield from writer.value(reader, key.strip(), VALUE_ENDS)):
                return
            yield from reader.space()
            if not (has_names := (yield from reader.skip(PARAMETER))):
                yield from reader.skip(FUNCTION_END)
        yield from reader.space()
        yield from reader.skip(END)
        reader.take()
        writer.end()
