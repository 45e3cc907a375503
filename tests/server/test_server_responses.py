"""/v1/responses of a running server, by the openai client."""

import httpx
import openai
import pytest
from pydantic import BaseModel

from megatron_star.server.wires.responses_schema import LOGPROBS

QUESTION = "What is the capital of France?"
ASKED = {"model": "smollm2", "input": QUESTION, "temperature": 0, "max_output_tokens": 12}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_answer_is_that_of_a_chat(client):
    response = client.responses.create(**ASKED, instructions="Be short.")
    chat = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=12,
    )
    assert response.output_text == chat.choices[0].message.content != ""
    assert response.status == {"stop": "completed", "length": "incomplete"}[chat.choices[0].finish_reason]
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert (response.instructions, response.max_output_tokens, response.store) == ("Be short.", 12, False)


def test_a_stream_ends_with_the_whole_answer(client):
    whole = client.responses.create(**ASKED)
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created" and events[-1].type == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == whole.output_text
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_an_answer_that_was_too_short_says_so_and_is_continued(client):
    cut = client.responses.create(**ASKED | {"max_output_tokens": 3})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    items = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in cut.output)]
    rest = client.responses.create(**ASKED | {"input": items, "max_output_tokens": 9})
    assert cut.output_text + rest.output_text == client.responses.create(**ASKED).output_text


def test_the_next_turn_takes_the_answer_back_as_it_is(client):
    first = client.responses.create(**ASKED)
    items = [
        {"role": "user", "content": QUESTION},
        *first.output,
        {"role": "user", "content": "And of Spain?"},
    ]
    second = client.responses.create(**ASKED | {"input": items})
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert second.output_text


def test_an_answer_has_the_structure_that_was_asked_for(client):
    class Person(BaseModel):
        name: str

    response = client.responses.parse(**ASKED | {"input": "A person named Bo."}, text_format=Person)
    assert isinstance(response.output_parsed, Person)


def test_log_probabilities_come_with_the_text(client):
    response = client.responses.create(**ASKED, include=[LOGPROBS], top_logprobs=1)
    found = response.output[0].content[0].logprobs
    assert len(found) == response.usage.output_tokens
    assert all(token.logprob <= 0 and token.top_logprobs for token in found)


def test_what_cannot_be_done_is_refused_with_the_name_of_the_field(client, server):
    with pytest.raises(openai.BadRequestError, match="previous_response_id: only null is supported here"):
        client.responses.create(**ASKED, previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="input: "):
        client.responses.create(**ASKED | {"input": [{"role": "user", "content": [{"type": "input_file"}]}]})
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASKED | {"model": "another"})
    with pytest.raises(openai.BadRequestError, match="more tokens than|the model's limit is 8192"):
        client.responses.create(**ASKED | {"input": "one two " * 8192}, stream=True)
    assert httpx.get(f"{server.url}/health").json()["ready"]
