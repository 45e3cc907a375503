"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`; in v11, `[TOOL_CALLS]name[ARGS]{...}` each."""

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.json_text import read_arguments, read_call
from megatron_star.server.tools.reader import Reader, Steps

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
AS_LIST = Shape('{"name": "', '", "arguments": ', "}", between=", ", all_begin=f"{BEGIN}[", all_end="]")
NAMED = Shape(BEGIN, ARGUMENTS, "")


class Mistral(CallFormat):
    """See above; both forms are read."""

    marks = (BEGIN, ID, ARGUMENTS)
    id_length = 9

    def __init__(self, *names: str, as_list: bool) -> None:
        """as_list: how calls that are asked for are written; both are read."""
        self.names, self.shape = names, AS_LIST if as_list else NAMED

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        while (yield from reader.until((BEGIN,), deltas.content)):
            yield from reader.space()
            if (yield from reader.skip("[")):
                yield from self._list(reader, deltas)
            elif (yield from reader.peek()) == "{":
                yield from read_call(reader, deltas)
            else:
                yield from self._named(reader, deltas)
            deltas.content(reader.take())

    def _list(self, reader: Reader, deltas: Deltas) -> Steps[None]:
        yield from reader.space()
        while (yield from read_call(reader, deltas)):
            yield from reader.space()
            if not (yield from reader.skip(",")):
                yield from reader.skip("]")
                reader.take()
                return
            yield from reader.space()

    def _named(self, reader: Reader, deltas: Deltas) -> Steps[None]:
        name = yield from reader.name()
        if name and (yield from reader.skip(ID)):
            yield from reader.name()
        yield from reader.skip(ARGUMENTS)
        yield from reader.space()
        if name:
            yield from read_arguments(reader, deltas, name)
