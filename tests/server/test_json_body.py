"""A body is looked at as a whole before its items are, and has one error, however many things are wrong."""

import asyncio
import json
import threading

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_star.server.errors import RequestError
from megatron_star.server.json_body import MOST_NAMES, MOST_NUMBERS, MOST_PARTS, BodyChecker, checked
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.completion_schema import CompletionRequest

MOST_TOKENS = 8192
COMPLETION, CHAT = TypeAdapter(CompletionRequest), TypeAdapter(ChatRequest)


class Looked:
    """An adapter that must not come to look at the items."""

    def validate_python(self, values):
        raise AssertionError("it was looked at")


def message(body: bytes, adapter=COMPLETION) -> str:
    with pytest.raises(RequestError) as error:
        checked(body, adapter, MOST_TOKENS)
    assert error.value.status == 400
    return error.value.message


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"-1," * 1_000_000 + b"1]}",
        b'{"prompt": [' + b"[]," * MOST_PARTS + b"[]]}",
        b'{"prompt": [' + b"{}," * MOST_PARTS + b"{}]}",
        b'{"prompt": [' + b'"",' * MOST_PARTS + b'""]}',
        b'{"prompt": [' + b'"[",' * MOST_PARTS + b'""]}',
        b"[" * (MOST_PARTS + 1),
        b"{" + b'"a":1,' * MOST_PARTS + b'"a":1}',
        b"[" + b"1," * MOST_NUMBERS + b"1,1]",
        b'{"prompt": [' + b"1," * MOST_TOKENS + b"1]}",
        b'{"prompt": [[' + b"1," * MOST_TOKENS + b"1]]}",
        json.dumps({"logit_bias": {str(i): 1 for i in range(MOST_NAMES + 1)}}).encode(),
        json.dumps({"messages": [{"content": {str(i): 1 for i in range(MOST_NAMES + 1)}}]}).encode(),
    ],
    ids=range(12),
)
def test_what_has_too_many_parts_is_refused_before_they_are_looked_at(body):
    text = message(body, Looked())
    assert "more than" in text or "the limit is" in text


@pytest.mark.parametrize(
    "text", ["[{:" * MOST_PARTS, '\\"[' * MOST_PARTS, '\\\\"'[:2] * MOST_PARTS, "," * MOST_NUMBERS * 2]
)
def test_a_text_may_contain_what_would_be_too_many_parts(text):
    body = b'{"model": "m", "prompt": ' + json.dumps(text).encode() + b"}"
    assert checked(body, COMPLETION, MOST_TOKENS).prompt == text


def test_escaped_backslashes_do_not_hide_where_a_text_ends():
    assert "more than" in message(b'["\\\\", ' + b"[]," * MOST_PARTS + b"[]]", Looked())


@pytest.mark.parametrize(
    ("adapter", "values"),
    [
        (COMPLETION, {"model": "m", "prompt": [-1] * MOST_TOKENS}),
        (COMPLETION, {"model": "m", "prompt": [[-1] * 100] * 100}),
        (COMPLETION, {"model": "m", "prompt": "x", "stop": [1] * 5000, "contexts": [1] * 5000}),
        (CHAT, {"model": "m", "messages": [{"role": "x"}] * 4096}),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": [{"type": "x"}] * 1024}]}),
    ],
    ids=range(5),
)
def test_wrong_items_are_few_errors(adapter, values):
    with pytest.raises(ValidationError) as error:
        adapter.validate_python(values)
    assert error.value.error_count() < 30


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[" * 50_000, b"9" * 5000, '{"a": 1}'.encode("utf-16"), b"\x00"],
    ids=range(7),
)
def test_what_is_no_json_is_said_so(body):
    assert message(body).startswith("the body is no JSON: ")


def test_a_long_body_does_not_hold_up_a_short_one():
    may_end = threading.Event()

    class Slow:
        def validate_python(self, values):
            assert may_end.wait(60)
            return "long"

    async def both():
        bodies = BodyChecker()
        long = asyncio.ensure_future(bodies.check(json.dumps("x" * 100_000).encode(), Slow(), MOST_TOKENS))
        short = await bodies.check(b'{"model": "m", "prompt": "x"}', COMPLETION, MOST_TOKENS)
        assert not long.done()
        may_end.set()
        return short.prompt, await long

    assert asyncio.run(both()) == ("x", "long")
