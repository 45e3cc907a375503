"""Bytes and places of tokens in OpenAI's answers, where characters are split between tokens."""

from types import SimpleNamespace

import pytest
from small_tokenizers import KINDS, small_tokenizer
from transformers import AutoTokenizer

from megatron_star.engine.answer import NewToken
from megatron_star.server.tools.answer_parser import PlainParser
from megatron_star.server.tools.tool_use import AnswerReading
from megatron_star.server.wires.chat_answers import ChatAnswers
from megatron_star.server.wires.completion_answers import CompletionAnswers
from megatron_star.text.prompt import SplitPrompt
from megatron_star.text.token_bytes import TokenBytes

PROMPT = "the user"
TEXT = " and \U0001f99a, \u6f22\u5b57 \U0001f999\n\u00fc"


@pytest.fixture(params=[*KINDS, "smollm2"])
def answered(request, smollm2):
    """A service and a batch whose one answer is TEXT after PROMPT."""
    name = request.param
    tokenizer = AutoTokenizer.from_pretrained(smollm2[0]) if name == "smollm2" else small_tokenizer(name)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    tokens = tokenizer.encode(PROMPT + TEXT, add_special_tokens=False)[len(prompt) :]
    answer = SimpleNamespace(
        tokens=tokens,
        logprobs=[-0.5] * len(tokens),
        top=[((tokens[0], -0.1),)] * len(tokens),
        text=TEXT,
        finish_reason="length",
    )
    service = SimpleNamespace(tokenizer=tokenizer, token_bytes=TokenBytes(tokenizer))
    split = SplitPrompt([], prompt, "last_tokens")
    batch = SimpleNamespace(splits=[split], answers=[answer], echoes=[], num_choices=1, num_shown=1)
    return service, batch, answer


def pieces_of(answers, answer) -> list[dict]:
    """The chunks of a stream of this answer."""
    tokens = zip(answer.tokens, answer.logprobs, answer.top, strict=True)
    return [p for token, value, best in tokens for p in answers.piece(0, NewToken(token, value, "", best))]


def chat(service) -> ChatAnswers:
    """Of one answer, which is content as it is."""
    return ChatAnswers(service, AnswerReading([PlainParser()]), logprobs=True)


def test_the_bytes_of_all_tokens_are_those_of_the_text(answered):
    service, _, answer = answered
    content = chat(service).choice(0, answer)["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]) == TEXT.encode()
    streamed = [p["logprobs"]["content"][0] for p in pieces_of(chat(service), answer)]
    assert streamed == content


def test_each_token_begins_where_its_first_byte_is_in_the_text(answered):
    service, batch, answer = answered
    expected, num_bytes = [], 0
    starts = [len(TEXT[:n].encode()) for n in range(len(TEXT) + 1)]
    for token in answer.tokens:
        expected.append(max(n for n, start in enumerate(starts) if start <= num_bytes))
        num_bytes += len(service.token_bytes.of(token))

    def answers():
        return CompletionAnswers(service, batch, logprobs=1)

    whole = answers().choice(0, answer)["logprobs"]
    streamed = [piece["logprobs"] for piece in pieces_of(answers(), answer)]
    assert whole["text_offset"] == expected
    assert [offset for piece in streamed for offset in piece["text_offset"]] == expected
    assert len(whole["tokens"]) == len(whole["top_logprobs"]) == len(answer.tokens)


def test_the_pieces_of_a_text_without_split_characters_are_the_text():
    for kind in KINDS:
        tokenizer = small_tokenizer(kind)
        tokens = tokenizer.encode("the user and the question", add_special_tokens=False)
        assert "".join(TokenBytes(tokenizer).pieces(tokens, at_start=True)) == "the user and the question"


def test_the_likeliest_tokens_are_told_and_the_one_that_was_drawn_among_them(answered):
    service, _, answer = answered
    token = chat(service).choice(0, answer)["logprobs"]["content"][1]
    assert [(top["token"], top["logprob"]) for top in token["top_logprobs"]] == [
        (service.token_bytes.piece(answer.tokens[0]), -0.1),
        (service.token_bytes.piece(answer.tokens[1]), -0.5),
    ]
