"""Texts that an answer must not have, as tokens: at the beginning of a text, and after a space."""

import pytest
from small_tokenizers import KINDS, small_tokenizer

from megatron_star.config import FieldError
from megatron_star.text.bad_words import bad_word_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_forbidden_with_and_without_a_space_before_it(kind):
    tokenizer = small_tokenizer(kind)
    expected = {
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in ("user", " user", "the question", " the question")
    }
    assert set(bad_word_tokens(tokenizer, ["user", "  the question", "user"])) == expected


def test_a_word_that_is_no_token_is_refused():
    class Tokenizer:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return []

    with pytest.raises(FieldError, match="bad_words: 'x' is no token"):
        bad_word_tokens(Tokenizer(), ["x"])
