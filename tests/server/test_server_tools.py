"""Calls of tools by the real model, which a grammar makes write them: the `openai` client, unmodified."""

import json

import openai
import pytest
from pydantic import BaseModel

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "Is it warm in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "description": "What time it is."}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ASKED = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 120}


class Weather(BaseModel):
    """Of the arguments."""

    city: str
    unit: str


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


def check_call(call) -> None:
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and call.type == "function" and call.id
    assert arguments.keys() == {"city", "unit"} and arguments["unit"] in ("C", "F")


def test_a_named_function_is_called_as_its_schema_says(client):
    answer = client.chat.completions.create(**ASKED, tools=[WEATHER, NOW], tool_choice=NAMED)
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    check_call(call)
    assert choice.finish_reason == "tool_calls" and choice.message.content is None


def test_a_streamed_call_is_the_whole_one(client):
    request = ASKED | {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**request).choices[0].message.tool_calls[0]
    chunks = list(client.chat.completions.create(**request, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather" and calls[0].id and not calls[0].function.arguments
    assert "".join(call.function.arguments for call in calls) == whole.function.arguments
    assert len(calls) > 5 and all(call.index == 0 and call.function.name is None for call in calls[1:])
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(**request) as stream:
        stream.until_done()
        check_call(stream.get_final_completion().choices[0].message.tool_calls[0])


def test_the_clients_own_reading_of_arguments_works(client):
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    answer = client.chat.completions.parse(**ASKED, tools=[tool], tool_choice=NAMED)
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


def test_required_calls_end_within_their_bound_or_are_cut_off(client):
    answer = client.chat.completions.create(**ASKED, tools=[NOW], tool_choice="required")
    message = answer.choices[0].message
    assert {call.function.name for call in message.tool_calls} == {"now"}
    assert 1 <= len(message.tool_calls) <= 16 and message.content is None


def test_an_answer_with_calls_and_their_results_can_be_sent_back(client):
    answer = client.chat.completions.create(**ASKED, tools=[WEATHER], tool_choice=NAMED)
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "20 degrees"}
    request = ASKED | {"messages": [*QUESTION, message, result], "max_tokens": 4}
    said = client.chat.completions.create(**request, tools=[WEATHER])
    assert said.choices[0].finish_reason in ("stop", "length")
    dumped = request | {"messages": [*QUESTION, message.model_dump(), result]}
    assert client.chat.completions.create(**dumped).usage.prompt_tokens == said.usage.prompt_tokens


def test_with_auto_and_none_the_model_says_what_it_likes(client):
    plain = client.chat.completions.create(**ASKED | {"max_tokens": 8}).choices[0].message.content
    for choice in ("auto", "none"):
        request = ASKED | {"max_tokens": 8, "tools": [WEATHER], "tool_choice": choice}
        message = client.chat.completions.create(**request).choices[0].message
        assert message.content == plain and message.tool_calls is None


def test_log_probabilities_are_of_all_tokens_of_a_call(client):
    request = ASKED | {"tools": [WEATHER], "tool_choice": NAMED, "logprobs": True}
    answer = client.chat.completions.create(**request)
    whole = answer.choices[0].logprobs.content
    assert len(whole) == answer.usage.completion_tokens
    text = b"".join(bytes(token.bytes) for token in whole).decode()
    assert text.startswith('<tool_call>\n{"name": "get_weather", "arguments": {"')
    chunks = list(client.chat.completions.create(**request, stream=True))
    told = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert [token.token for token in told] == [token.token for token in whole]


def test_a_schema_that_no_grammar_can_be_made_of_is_refused_by_name(client):
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, tools=[tool], tool_choice="required")
    assert refused.value.param == "tool_choice"
