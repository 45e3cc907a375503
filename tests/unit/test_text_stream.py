"""Text of tokens one by one is the text of all of them."""

import random

import pytest
from transformers import AutoTokenizer

from megatron_star.text.text_stream import TextStream

TEXTS = [
    "Ünïcödé 🦙🦙 and 漢字, 1.5 'quoted' .",
    "  spaces  \n\n\tand lines ",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2[0])


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_after_each_token_is_the_text_of_all_tokens_so_far(tokenizer, text):
    stream, tokens = TextStream(tokenizer), tokenizer.encode(text, add_special_tokens=False)
    for count, token in enumerate(tokens, 1):
        stream.add(token)
        assert stream.text == tokenizer.decode(tokens[:count], skip_special_tokens=True)


def test_tokens_at_random_end_in_the_text_of_all_tokens(tokenizer):
    generator = random.Random(0)
    for _ in range(50):
        tokens = [generator.randrange(len(tokenizer)) for _ in range(40)]
        stream = TextStream(tokenizer)
        for token in tokens:
            stream.add(token)
        assert stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_long_answer_is_not_decoded_again_for_each_token(tokenizer):
    class Counting:
        most = 0

        def decode(self, token_ids, **options):
            self.most = max(self.most, len(token_ids))
            return tokenizer.decode(token_ids, **options)

    counting = Counting()
    stream = TextStream(counting)
    for token in tokenizer.encode("A sentence of some words. " * 40, add_special_tokens=False):
        stream.add(token)
    assert counting.most <= 3
