"""What an answer streams, where it ends, and which token comes next; without a model."""

import random

import pytest
import torch
from megatron.core.inference.sampling_params import SamplingParams
from small_tokenizers import KINDS, small_tokenizer

from megatron_star.engine.answer import Answer
from megatron_star.engine.request import StarRequest
from megatron_star.engine.sampling import Choice, sample_rows
from megatron_star.planning.plan import TokenCosts
from megatron_star.planning.planner import Planner

FRAGMENTS = ["Hi", "\n", "\U0001f999", "\U0001f99a", " the end", "\u6f22\u5b57", " \u00fc", ".", "a", "</s>"]


def answer_to(tokenizer, prompt: list[int], *, count: int, stops: list[str] = (), **options) -> Answer:
    sampling = SamplingParams(top_k=1, num_tokens_to_generate=count, stop_words=list(stops))
    request = StarRequest(context_tokens=[], query_tokens=prompt, sampling=sampling, **options)
    planned = Planner(TokenCosts(), 1).plan(0, request.star)
    return Answer(0, request, planned, tokenizer)


def generate(answer: Answer, tokens: list[int]) -> list[str]:
    """The pieces of text that come as the model chooses these tokens, until the answer ends."""
    pieces = []
    for token in tokens:
        answer.add_token(Choice(token, -1.0))
        pieces.append(answer._events.get().text)
        if answer.finish_reason:
            break
    return pieces


def whole_characters(text: str, offsets: list[tuple[int, int]], count: int) -> str:
    """The part of a text that its first `count` tokens write, without a character that is not whole."""
    end = offsets[count - 1][1]
    broken = count < len(offsets) and offsets[count][0] < end
    return text[: end - broken].replace("</s>", "")


def cut_at_first(texts: list[str], stops: list[str]) -> str:
    """The first text that has a stop text, before that; or the last."""
    for text in texts:
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)]
    return texts[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_stream_ever_shows_a_piece_of_a_stop_text_or_half_a_character(kind):
    generator, tokenizer = random.Random(0), small_tokenizer(kind)
    prompt = tokenizer.encode("the user", add_special_tokens=False)
    fragments = (
        FRAGMENTS if kind == "byte_level" else FRAGMENTS[:-1]
    )  # others add a space after a special token
    num_stopped = 0
    for _ in range(1500):
        text = "".join(generator.choices(fragments, k=generator.randrange(2, 7)))
        encoding = tokenizer(f"the user{text}", add_special_tokens=False, return_offsets_mapping=True)
        tokens = encoding.input_ids[len(prompt) :]
        offsets = [(start - 8, end - 8) for start, end in encoding.offset_mapping[len(prompt) :]]
        count = generator.randrange(1, len(tokens) + 1)
        stops = random_stops(generator, text)
        written = [whole_characters(text, offsets, n) for n in range(1, count + 1)]
        expected = cut_at_first(written, stops)

        answer = answer_to(tokenizer, prompt, count=count, stops=stops)
        streamed = generate(answer, tokens)
        assert "".join(streamed) == answer.text
        assert answer.text.rstrip("\ufffd") == expected, (text, stops)
        for n in range(len(streamed)):
            assert expected.startswith("".join(streamed[:n])), (text, stops, n)
        num_stopped += answer.finish_reason == "stop"
    assert num_stopped > 300


def random_stops(generator: random.Random, text: str) -> list[str]:
    """Up to three texts of up to four characters, most of them in the text."""
    starts = [generator.randrange(len(text)) for _ in range(generator.randrange(4))]
    stops = [text[start : start + generator.randrange(1, 5)] for start in starts]
    return [stop[:-1] + "\U0001f99a" if generator.random() < 0.2 else stop for stop in stops]


def test_the_beginning_of_a_stop_text_is_held_while_its_next_character_is_not_whole():
    tokenizer = small_tokenizer("byte_level")
    tokens = tokenizer.encode("Hi\n\U0001f99a", add_special_tokens=False)
    answer = answer_to(tokenizer, [0], count=99, stops=["\n\U0001f99a"])
    assert "".join(generate(answer, tokens)) == answer.text == "Hi"


def test_half_a_character_is_not_mistaken_for_a_stop_text():
    tokenizer = small_tokenizer("byte_level")
    tokens = tokenizer.encode("a\U0001f99ab", add_special_tokens=False)
    answer = answer_to(tokenizer, [0], count=len(tokens), stops=["\ufffd"])
    assert "".join(generate(answer, tokens)) == "a\U0001f99ab"


@pytest.mark.parametrize("kind", ["metaspace", "legacy_metaspace"])
def test_the_space_before_the_first_word_is_kept_where_the_answer_goes_on_after_a_word(kind):
    tokenizer = small_tokenizer(kind)
    prompt = tokenizer.encode("the user", add_special_tokens=False)
    tokens = tokenizer.encode("the user and", add_special_tokens=False)[len(prompt) :]
    assert "".join(generate(answer_to(tokenizer, prompt, count=9), tokens)) == " and"


@pytest.mark.parametrize("end", [3, 300])
def test_any_end_token_ends_the_answer_and_is_no_part_of_its_text(end):
    tokenizer = small_tokenizer("byte_level")
    answer = answer_to(tokenizer, [5], count=9, end_tokens=(3, 300))
    generate(answer, [*tokenizer.encode("the", add_special_tokens=False), end, 7])
    assert (answer.text, answer.finish_reason, answer.tokens[-1]) == ("the", "stop", end)


def test_before_min_tokens_no_end_token_is_chosen_and_no_stop_text_heeded():
    tokenizer = small_tokenizer("byte_level")
    a = tokenizer.convert_tokens_to_ids("a")
    logits = torch.zeros(len(tokenizer))
    logits[[3, a, 4]] = torch.tensor([9.0, 8.0, 8.5])
    answer = answer_to(tokenizer, [5], count=9, stops=["aa"], min_tokens=4, end_tokens=(3, 4, 10**6))
    while not answer.finish_reason:
        answer.add_token(*sample_rows(logits[None], answer.rows_to_sample(1, len(logits))))
    assert (answer.tokens, answer.text) == ([a] * 4, "aa")
    assert answer.logprobs == pytest.approx([logits.log_softmax(-1)[a].item()] * 4)


def test_a_text_has_the_special_tokens_that_are_asked_for_and_none_of_the_hidden_ones():
    tokenizer = small_tokenizer("byte_level")
    prompt, *_ = tokenizer.encode("the", add_special_tokens=False)
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    options = {"skip_special_tokens": False, "hidden_tokens": frozenset([end])}
    answer = answer_to(tokenizer, [prompt], count=4, **options)
    assert "".join(generate(answer, [begin, prompt, end, prompt])) == "<|im_start|>thethe"
