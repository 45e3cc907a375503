"""The text of tokens that come one by one, without decoding all of them each time."""

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Protocol

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character, or not yet."""
PROMPT_TOKENS = 8
"""Tokens of a prompt that are decoded with what follows."""


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of these tokens."""


class TextStream:
    """Decodes a few tokens before the new one with it, since decoders look at their neighbours."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_tokens: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """
        Args:
            prompt_tokens: what the text continues; the space before its first word may depend on it.
            skip_special_tokens: the text does not have them.
        """
        self.tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._tokens = list(prompt_tokens[-PROMPT_TOKENS:])
        self._window, self._settled = 0, len(self._tokens)
        self._window_text = self._decode(0) if self._tokens else ""
        self._settled_text = self._rest = ""

    @property
    def text(self) -> str:
        """Of all tokens so far; a character that is not whole yet is U+FFFD."""
        return self._settled_text + self._rest

    @property
    def certain(self) -> str:
        """The part of `text` that no later token changes."""
        return self.text.rstrip(UNFINISHED)

    def add(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        window = self._decode(self._window)
        self._rest = window[len(commonprefix([window, self._window_text])) :]
        if self._rest and not self._rest.endswith(UNFINISHED):
            self._settled_text, self._rest = self.text, ""
            self._window, self._settled = self._settled, len(self._tokens)
            self._window_text = self._decode(self._window)

    def _decode(self, start: int) -> str:
        return self.tokenizer.decode(self._tokens[start:], skip_special_tokens=self._skip_special_tokens)


def text_offsets(stream: TextStream, tokens: Sequence[int]) -> Iterator[int]:
    """Where in the stream's text each of these further tokens begins, in characters.

    Tokens that share a character begin where it does.
    """
    for token in tokens:
        yield len(stream.certain)
        stream.add(token)
