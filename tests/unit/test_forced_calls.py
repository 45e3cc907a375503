"""The grammar of an answer that must be a call lets through what the format's parser reads, and no more."""

import json

import llguidance.hf
import pytest
from answer_texts import TEXTS
from llguidance import LLMatcher
from small_tokenizers import small_tokenizer
from tokenizers import AddedToken

from megatron_star.server.tools.answer_parser import AnswerFormats
from megatron_star.server.tools.deltas import Arguments, Call
from megatron_star.server.tools.forced_calls import forced_calls
from megatron_star.server.tools.formats import CALL_FORMATS

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "integer"},
            "at": {"$ref": "#/$defs/At"},
        },
        "required": ["city"],
        "$defs": {"At": {"type": "object", "properties": {"h": {"type": "integer"}}, "required": ["h"]}},
    },
    "now": {},
}
WEATHER = {"city": 'São "P"\n <b>', "unit": "C", "days": 3, "at": {"h": 4}}


def known(name: str):
    return next(known for known in CALL_FORMATS if name in known.names)


@pytest.fixture(scope="module", params=[False, True], ids=["texts", "special tokens"])
def tokenizer(request):
    tokenizer = small_tokenizer("byte_level")
    if request.param:
        marks = {mark for known in CALL_FORMATS for mark in known.marks}
        marks = [AddedToken(mark, special=True, normalized=False) for mark in sorted(marks)]
        tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


def written(name: str, calls: list[tuple[str, dict]]) -> str:
    """Calls as the format's shape has them."""
    shape, texts = known(name).shape, []
    for function, arguments in calls:
        text = json.dumps(arguments, ensure_ascii=False)
        if shape.argument:
            before, between, after = shape.argument
            values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
            text = "".join(before + key + between + value + after for key, value in values.items())
        texts.append(shape.begin + function + shape.after_name + text + shape.end)
    return shape.all_begin + (shape.between or "").join(texts) + shape.all_end


def is_taken(tokenizer, name: str, text: str, most_calls: int | None = None) -> bool:
    special = {str(p): t for t, p in tokenizer.added_tokens_decoder.items() if p.special}
    grammar = forced_calls(known(name).shape, TOOLS, most_calls, special)
    matcher = LLMatcher(llguidance.hf.from_tokenizer(tokenizer), llguidance.grammar_from("lark", grammar))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("name", TEXTS)
def test_calls_that_the_schemas_allow_are_taken_and_read(tokenizer, name):
    calls = [("get_weather", WEATHER), ("now", {}), ("get_weather", {"city": ""})]
    calls = calls if known(name).shape.between is not None else calls[:1]
    text = written(name, calls)
    assert is_taken(tokenizer, name, text)
    parser = AnswerFormats(known(name)).parser(TOOLS)
    deltas = parser.add(text) + parser.finish()
    assert [delta.name for delta in deltas if isinstance(delta, Call)] == [call for call, _ in calls]
    read = "".join(delta.text if isinstance(delta, Arguments) else "\n\0" for delta in deltas)
    assert [json.loads(text) for text in read.split("\0")[1:]] == [arguments for _, arguments in calls]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "call",
    [
        ("other", {}),
        ("now", {"a": 1}),
        ("get_weather", {}),
        ("get_weather", {"city": "a", "unit": "K"}),
        ("get_weather", {"city": "a", "days": 1.5}),
        ("get_weather", {"city": "a", "at": {}}),
        ("get_weather", {"city": "a", "other": "b"}),
    ],
    ids=str,
)
def test_calls_that_they_do_not_allow_are_not_taken(tokenizer, name, call):
    assert not is_taken(tokenizer, name, written(name, [call]))


@pytest.mark.parametrize("name", TEXTS)
def test_text_and_too_many_calls_are_not_taken(tokenizer, name):
    one, two = written(name, [("now", {})]), written(name, [("now", {})] * 2)
    assert is_taken(tokenizer, name, one) and is_taken(tokenizer, name, one, 1)
    assert is_taken(tokenizer, name, two) is (known(name).shape.between is not None)
    assert not is_taken(tokenizer, name, two, 1)
    assert not is_taken(tokenizer, name, "So. " + one) and not is_taken(tokenizer, name, "")
    assert not is_taken(tokenizer, name, written(name, [("now", {})] * 17))


def test_harmonys_reasoning_may_come_before_its_call(tokenizer):
    text = "<|channel|>analysis<|message|>I need\n\nthe time.<|end|><|start|>assistant"
    assert is_taken(tokenizer, "openai", text + written("openai", [("now", {})]))
    assert not is_taken(tokenizer, "openai", text)
