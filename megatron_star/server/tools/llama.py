"""Llama 3: `{"name": ..., "parameters": {...}}`, where an answer begins, or after `<|python_tag|>`."""

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.json_text import read_call
from megatron_star.server.tools.reader import Reader, Steps

TAG = "<|python_tag|>"
BETWEEN = ";"


class Llama(CallFormat):
    """See above. No mark tells a call from another JSON text: its name must be that of a tool."""

    names = ("llama3_json", "llama4_json")
    shape = Shape('{"name": "', '", "parameters": ', "}", between=f"{BETWEEN} ")
    marks = (TAG,)

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        mark: str | None = TAG
        while mark:
            yield from reader.space()
            yield from reader.skip(TAG)
            yield from reader.space()
            while (yield from read_call(reader, deltas, tools)):
                yield from reader.space()
                yield from reader.skip(BETWEEN)
                yield from reader.space()
            deltas.content(reader.take())
            mark = yield from reader.until((TAG,), deltas.content)
