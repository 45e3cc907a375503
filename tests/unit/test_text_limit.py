"""What will be refused is hardly tokenized."""

import pytest
from transformers import AutoTokenizer

from megatron_star.text.text_limit import TextLimit

MOST_TOKENS = 1000
SENTENCE = "The quick brown fox jumps over the lazy dog, and so on. "


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.num_characters = tokenizer, 0

    def encode(self, text, **options):
        self.num_characters += len(text)
        return self.tokenizer.encode(text, **options)

    def get_vocab(self):
        return self.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2[0])


@pytest.mark.parametrize(
    "text", [SENTENCE * 1400, "1" * 80_000, "中文" * 40_000, " " * 1000 * 100], ids=range(4)
)
def test_a_text_that_is_too_long_is_refused_after_little_work(tokenizer, text):
    counting = Counting(tokenizer)
    with pytest.raises(ValueError, match="more tokens than the model's limit, 1000"):
        TextLimit(counting, MOST_TOKENS).check(text)
    assert counting.num_characters < 8 * MOST_TOKENS


@pytest.mark.parametrize(
    "piece", [" " * 64, "-" * 64, SENTENCE, "1", "\n", "a", "internationalization ", "🦙"]
)
def test_a_text_that_fits_is_never_refused(tokenizer, piece):
    text = piece * (80 * MOST_TOKENS // len(piece))
    ids = tokenizer.encode(text, add_special_tokens=False)
    longest = tokenizer.decode(ids[: MOST_TOKENS - 2])
    TextLimit(tokenizer, MOST_TOKENS).check(longest)
