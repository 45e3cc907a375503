"""GLM 4.5 and later: `<tool_call>name`, then `<arg_key>..</arg_key><arg_value>..</arg_value>` for each."""

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.reader import Reader, Steps
from megatron_star.server.tools.typed_values import ArgumentsWriter

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class Glm(CallFormat):
    """See above."""

    names = ("glm45", "glm47")
    shape = Shape(BEGIN, "\n", END, (KEY, f"{KEY_END}\n{VALUE}", f"{VALUE_END}\n"), between="\n")
    marks = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        while (yield from reader.until((BEGIN,), deltas.content)):
            yield from reader.space()
            name = yield from reader.name()
            yield from reader.space()
            if name and (yield from self._arguments(reader, deltas, name, tools)):
                reader.take()
            deltas.content(reader.take())

    def _arguments(self, reader: Reader, deltas: Deltas, name: str, tools: Tools) -> Steps[bool]:
        """False if this is no call, up to its first name or its end."""
        has_names = yield from reader.skip(KEY)
        if not has_names and not (yield from reader.skip(END)):
            return False
        deltas.call(name)
        reader.take()
        writer = ArgumentsWriter(deltas, tools.get(name, {}))
        while has_names:
            key = yield from reader.head(KEY_END)
            yield from reader.space()
            if key is None or not (yield from reader.skip(VALUE)):
                break
            if not (yield from writer.value(reader, key.strip(), (VALUE_END,))):
                return True
            yield from reader.space()
            has_names = yield from reader.skip(KEY)
        else:
            yield from reader.skip(END)
        reader.take()
        writer.end()
        return True
