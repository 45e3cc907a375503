"""Reasoning at the beginning of an answer, between two marks."""

from dataclasses import dataclass

from megatron_star.server.tools.deltas import Deltas
from megatron_star.server.tools.reader import Reader, Steps


@dataclass(frozen=True)
class ReasoningFormat:
    """
    Attributes:
        names: on the command line; the first is the format's own.
        start, end: the marks, of which the chat template may write the first one.
        always: an answer begins with reasoning, whether or not there is a mark that says so.
    """

    names: tuple[str, ...]
    start: str
    end: str
    always: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that are special tokens in some vocabularies."""
        return self.start, self.end

    def is_open_after(self, prompt: str) -> bool:
        """A prompt that ends so has begun the answer's reasoning."""
        prompt = prompt.rstrip()
        return prompt.endswith(self.start) or (self.always and not prompt.endswith(self.end))

    def parse(self, reader: Reader, deltas: Deltas, *, is_open: bool) -> Steps[None]:
        """Reads reasoning, if the answer begins with it; what follows is left."""
        yield from reader.space()
        has_mark = yield from reader.skip(self.start)
        if not has_mark and not is_open:
            return
        deltas.reasoning("")
        if has_mark:
            reader.take()
        yield from reader.until((self.end,), deltas.reasoning)
        reader.take()
