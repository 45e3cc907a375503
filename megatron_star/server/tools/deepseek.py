"""DeepSeek V3 and R1, whose arguments stand in a code block, and V3.1, where they stand alone."""

from megatron_star.server.tools.call_format import CallFormat, Shape, Tools
from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.json_text import read_arguments
from megatron_star.server.tools.reader import Reader, Steps

ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
BLOCK_BEGIN, BLOCK_END = "```json", "```"
IN_BLOCK = Shape(
    f"{BEGIN}function{SEPARATOR}",
    f"\n{BLOCK_BEGIN}\n",
    f"\n{BLOCK_END}{END}",
    between="\n",
    all_begin=ALL_BEGIN,
    all_end=ALL_END,
)
ALONE = Shape(BEGIN, SEPARATOR, END, all_begin=ALL_BEGIN, all_end=ALL_END)


class DeepSeek(CallFormat):
    """`BEGIN name SEPARATOR {...} END`, or `BEGIN function SEPARATOR name ```json {...} ``` END`."""

    marks = (ALL_BEGIN, ALL_END, BEGIN, SEPARATOR, END)

    def __init__(self, *names: str, in_block: bool) -> None:
        """in_block: how a call that is asked for is written; both are read."""
        self.names, self.shape = names, IN_BLOCK if in_block else ALONE

    def parse(self, reader: Reader, deltas: Deltas, tools: Tools) -> Steps[None]:
        """See `CallFormat`."""
        while mark := (yield from reader.until((ALL_BEGIN, BEGIN), deltas.content)):
            if mark == ALL_BEGIN:
                yield from reader.space()
            if mark == BEGIN or (yield from reader.skip(BEGIN)):
                yield from self._call(reader, deltas)
            deltas.content(reader.take())

    def _call(self, reader: Reader, deltas: Deltas) -> Steps[None]:
        name = yield from reader.name()
        if not name or not (yield from reader.skip(SEPARATOR)):
            return
        yield from reader.space()
        is_in_block = (yield from reader.peek()) != "{"
        if is_in_block:
            name = yield from reader.name()
            yield from reader.space()
            if not name or not (yield from reader.skip(BLOCK_BEGIN)):
                return
            yield from reader.space()
        if not (yield from read_arguments(reader, deltas, name)):
            return
        yield from reader.space()
        if is_in_block:
            yield from reader.skip(BLOCK_END)
            yield from reader.space()
        yield from reader.skip(END)
        yield from reader.space()
        yield from reader.skip(ALL_END)
        reader.take()
