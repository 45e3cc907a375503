"""The text of an answer as its tokens come: cut at a stop text, given out when it is certain to stay."""

from collections.abc import Sequence

from megatron_star.engine.request import StarRequest
from megatron_star.text.text_stream import PROMPT_TOKENS, TextStream, Tokenizer


class AnswerText:
    """
    Attributes:
        text: of the tokens so far, cut before a stop text or behind it, as the request says.
    """

    def __init__(self, tokenizer: Tokenizer, request: StarRequest) -> None:
        # Slices first: what came before may be a million tokens.
        prompt = request.context_tokens[-PROMPT_TOKENS:] + request.query_tokens[-PROMPT_TOKENS:]
        self._stream = TextStream(tokenizer, prompt, skip_special_tokens=request.skip_special_tokens)
        self.request, self.text = request, ""
        self._num_emitted = self._num_searched = 0

    @property
    def _stops(self) -> Sequence[str]:
        return self.request.sampling.stop_words or ()

    def add(self, token: int, *, ends: bool) -> None:
        """One more token.

        ends: it is one that ends the answer. Then it is a part of it only if stop texts are.
        """
        request = self.request
        if token in request.hidden_tokens or (ends and not request.include_stop_text):
            return
        self._stream.add(token)
        self.text = self._stream.text
        if ends and request.skip_special_tokens:
            self.text += self._skipped_stop_text(token)

    def cut_at_stop_text(self, *, num_tokens: int, is_over: bool) -> bool:
        """End before the first stop text that is complete now, and was not before; whether there is one.

        Args:
            num_tokens: of the answer: before `min_tokens` none is heeded.
            is_over: no token follows.
        """
        text = self._certain(is_over)
        searched, self._num_searched = self._num_searched, len(text)
        if num_tokens < self.request.min_tokens:
            return False
        starts = [(text.find(stop, max(0, searched - len(stop) + 1)), len(stop)) for stop in self._stops]
        found = [(start, length) for start, length in starts if start >= 0]
        if found:
            start, length = min(found)
            self.text = text[: start + length if self.request.include_stop_text else start]
        return bool(found)

    def emit(self, *, is_over: bool) -> str:
        """What is certain to stay and was not given out: no half character, no beginning of a stop text."""
        text = self._certain(is_over)
        end = len(text)
        if not (is_over or self.request.include_stop_text):
            end -= max(
                (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
            )
        piece = text[self._num_emitted : max(end, self._num_emitted)]
        self._num_emitted += len(piece)
        return piece

    def _certain(self, is_over: bool) -> str:
        """What no later token changes: at the end, all; before, not a character that is not whole yet."""
        return self.text if is_over else self._stream.certain

    def _skipped_stop_text(self, token: int) -> str:
        """That of a special token, which ended the answer and is not in the stream."""
        text = self._stream.tokenizer.decode([token], skip_special_tokens=False)
        return text if text in self._stops else ""
