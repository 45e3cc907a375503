"""The text of tokens that come one by one, without decoding all of them each time."""

from typing import Protocol

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character, or not yet."""


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of these tokens."""


class TextStream:
    """Decodes a few tokens before the new one with it, since decoders look at their neighbours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._window = self._settled = 0
        self._settled_text = self._window_text = self._rest = ""

    @property
    def text(self) -> str:
        """Of all tokens so far, without special ones; a character that is not whole yet is U+FFFD."""
        return self._settled_text + self._rest

    def add(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        window = self._decode(self._window)
        self._rest = window[len(self._window_text) :]
        if self._rest and not self._rest.endswith(UNFINISHED):
            self._settled_text, self._rest = self.text, ""
            self._window, self._settled = self._settled, len(self._tokens)
            self._window_text = self._decode(self._window)

    def _decode(self, start: int) -> str:
        return self.tokenizer.decode(self._tokens[start:], skip_special_tokens=True)
