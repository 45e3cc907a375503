"""What /v1/responses takes is a chat in another dress, and what it cannot keep or do is refused by name."""

import inspect

import pytest
from openai.resources.responses import Responses
from pydantic import ValidationError

from megatron_star.server.wires.responses_schema import ResponsesRequest

OF_THE_CLIENT_ITSELF = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "one"}
THOUGHT = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "so"}],
}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": None}],
}


def request(**fields) -> ResponsesRequest:
    return ResponsesRequest(**{"model": "m", "input": "Hi"} | fields)


def messages(*items: dict) -> list[dict]:
    return [message.for_template() for message in request(input=list(items)).chat.messages]


def test_a_text_is_a_users_message_after_the_instructions():
    found = request(instructions="Be short.").chat.messages
    assert [(message.role, message.content) for message in found] == [("system", "Be short."), ("user", "Hi")]


def test_what_the_assistant_thought_said_and_called_is_one_message_as_in_a_chat():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = {"role": "user", "content": "Hi"}
    answer, result = messages(asked, THOUGHT, SAID, CALL, CALL, RESULT)[1:]
    assert answer == {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [call, call],
        "reasoning_content": "so",
    }
    assert result == {"role": "tool", "content": "one", "tool_call_id": "c1"}


def test_what_the_assistant_said_after_a_call_is_another_message():
    roles = [message["role"] for message in messages(CALL, RESULT, SAID, THOUGHT, SAID)]
    assert roles == ["assistant", "tool", "assistant", "assistant"]


def test_an_unfinished_message_at_the_end_is_continued():
    assert request(input=[SAID | {"status": "incomplete"}]).chat.continue_final_message
    assert not request(input=[SAID]).chat.continue_final_message


def test_fields_are_those_of_a_chat():
    chat = request(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.5,
        seed=3,
        reasoning={"effort": "low"},
        include=["message.output_text.logprobs"],
        top_logprobs=1,
        star={"mode": "exact"},
        chat_template_kwargs={"a": 1},
        metadata={"a": "b"},
    ).chat
    assert (chat.max_completion_tokens, chat.temperature, chat.top_p, chat.seed) == (7, 0.5, 0.5, 3)
    assert (chat.reasoning_effort, chat.logprobs, chat.top_logprobs) == ("low", True, 1)
    assert (chat.star.mode, chat.chat_template_kwargs, chat.metadata) == ("exact", {"a": 1}, {"a": "b"})


def test_every_field_that_the_openai_client_knows_may_be_null():
    names = inspect.signature(Responses.create).parameters.keys() - OF_THE_CLIENT_ITSELF
    ResponsesRequest(**dict.fromkeys(names) | {"model": "m", "input": "Hi"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"previous_response_id": "resp_1"}, "only null is supported"),
        ({"store": True}, "only null or false is supported"),
        ({"background": True}, "only null or false is supported"),
        ({"truncation": "auto"}, "only null or \"disabled\""),
        ({"tools": [{"type": "web_search"}]}, "'function'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "only message, function_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_text"),
        ({"input": [SAID, 5]}, "dictionary"),
        ({"input": []}, "at least 1"),
        ({"max_output_tokens": 0}, "greater than or equal to 1"),
        ({"reasoning": {"effort": "huge"}}, "effort"),
        ({"n": 2}, "only null or 1"),
        ({"messages": []}, "messages\n  Extra inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        request(**fields)
