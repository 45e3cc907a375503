"""Texts that an answer must not have, as tokens."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from megatron_star.config import FieldError


def bad_word_tokens(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the beginning of a text, and after a space where that is other tokens.

    Raises:
        FieldError: a word is no token at all.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (bare, f" {bare}"):
            if tokens := tuple(tokenizer.encode(text, add_special_tokens=False)):
                found[tokens] = None
            elif text == bare:
                raise FieldError(f"bad_words: {word!r} is no token", "bad_words")
    return tuple(found)
