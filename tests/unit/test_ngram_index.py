"""The index of places in a text, against a search of all places."""

import random

import numpy as np
import pytest

from megatron_star.engine import ngram_index
from megatron_star.engine.ngram_index import MOST_MATCHED, Match, NgramIndex


def _search(text: list[int], start: int, end: int, last: list[int]) -> Match | None:
    """The slow twin: every place of text[start:end], and how many of the last tokens end before it."""
    found = []
    for place in range(start + 1, end + 1):
        length = 0
        while length < min(len(last), MOST_MATCHED, place) and text[place - 1 - length] == last[-1 - length]:
            length += 1
        found.append(Match(length, place))
    best = max(found, default=Match(0, 0))
    return best if best.length >= 2 else None


def _text(seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Random tokens with repeated passages."""
    draw, text = random.Random(seed), []
    while len(text) < num_tokens:
        start = draw.randrange(len(text)) if text and draw.random() < 0.5 else None
        length = draw.randint(1, 40)
        text += (
            text[start : start + length] if start is not None else draw.choices(range(vocab_size), k=length)
        )
    return text[:num_tokens]


@pytest.mark.parametrize("vocab_size", [2, 30, 50_000])
@pytest.mark.parametrize("piece", [1, 37, 64, 1000])
def test_the_longest_match_is_that_of_a_search_of_all_places(vocab_size, piece):
    text, draw = _text(piece, 1037, vocab_size), random.Random(0)
    index = NgramIndex(0, len(text))
    for first in range(0, len(text), piece):
        index.append(text[first : first + piece])
        for _ in range(1 + piece // 20):
            num_tokens = index.num_tokens
            at = draw.randint(0, num_tokens)
            last = text[max(0, at - draw.randint(1, 50)) : at]
            assert index.longest_match(last) == _search(text, 0, num_tokens, last)


def test_matches_of_a_later_part_may_begin_before_it_and_end_where_is_asked():
    text = _text(3, 700, 30)
    index = NgramIndex(300, 400, text[:300])
    index.append(text[300:])
    for end in range(310, 700, 23):
        last = text[: end - 3][-MOST_MATCHED:]
        assert index.longest_match(last, end) == _search(text, 300, end, last)


def test_tokens_with_the_same_hash_are_no_match(monkeypatch):
    monkeypatch.setattr(ngram_index, "_MULTIPLIER", 0)
    text = _text(5, 500, 1000)
    index = NgramIndex(0, 500)
    index.append(text)
    for at in range(3, 500, 11):
        last = [7, *text[:at]][-20:]
        assert index.longest_match(last, at - 1) == _search(text, 0, at - 1, last)


def test_a_million_tokens_take_12_bytes_each_in_few_runs():
    tokens = np.random.default_rng(0).integers(0, 128_000, 1 << 20)
    index = NgramIndex(0, tokens.size)
    for piece in np.split(tokens, 32):
        index.append(piece)
    num_bytes = index._tokens.nbytes + sum(run.nbytes for run in index._runs)
    assert num_bytes <= 12 * tokens.size + 4 * MOST_MATCHED
    assert len(index._runs) == 1
    assert index.longest_match(tokens[5000:5010].tolist()) == Match(10, 5010)
