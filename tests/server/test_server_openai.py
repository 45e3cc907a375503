"""The `openai` client, unmodified, against two ranks."""

import openai
import pytest

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
DOCUMENT = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 60


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


def test_the_one_model_is_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_is_answered_whole(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)

    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    star = answer.usage.star
    assert star["split"] == "last_message"
    assert answer.usage.prompt_tokens == star["context_tokens"] + star["query_tokens"]


def test_a_chat_is_streamed_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 8


def test_completions_whole_and_streamed_say_the_same(client):
    request = {
        "model": MODEL,
        "prompt": "The capital of France is",
        "temperature": 0.8,
        "seed": 7,
        "max_tokens": 6,
    }
    whole = client.completions.create(**request)
    streamed = list(client.completions.create(**request, stream=True))

    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in streamed)
    assert whole.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == "length"


def test_several_prompts_and_choices_come_in_order_and_streamed_ones_carry_their_index(client):
    request = {
        "model": MODEL,
        "prompt": ["One, two,", "A, B,"],
        "n": 2,
        "seed": 1,
        "max_tokens": 3,
        "top_p": 0.9,
    }
    whole = client.completions.create(**request)
    texts = ["", "", "", ""]
    for chunk in client.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text

    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in whole.choices]


def test_a_stop_text_ends_the_answer_before_it(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stop=[" France"])
    assert answer.choices[0].message.content == "The capital of"
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_belong_to_the_tokens(client):
    chat = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, logprobs=True)
    plain = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, logprobs=0, max_tokens=2, echo=True
    )

    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content) == ANSWER + "<|im_end|>"
    assert all(-5 < token.logprob <= 0 for token in content)
    assert plain.choices[0].text == "The capital of France is Paris."
    assert plain.choices[0].logprobs.text_offset == [24, 30]


def test_token_ids_are_a_prompt_and_equal_their_text(client):
    by_text = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0)
    by_ids = client.completions.create(model=MODEL, prompt=[504, 3575, 282, 4649, 314], temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text


def test_a_second_question_about_a_document_finds_it_encoded(client):
    def ask(question):
        return client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{DOCUMENT}###{question}"}],
            max_completion_tokens=2,
            extra_body={
                "star": {"separator": "###", "block_size": 200, "anchor_size": 100, "neighbor_blocks": 1}
            },
        ).usage

    first, second = ask("What is blue?"), ask("What is yellow?")

    assert first.star["split"] == "separator"
    assert first.star["mode"] == "star" and first.star["blocks"] > 4
    assert not first.star["cache_hit"] and first.star["encode_seconds"] > 0
    assert second.star["cache_hit"]
    assert second.prompt_tokens_details.cached_tokens == second.star["context_tokens"]


def test_the_next_turn_of_a_chat_finds_what_the_turn_before_encoded(client):
    messages = [{"role": "user", "content": DOCUMENT + "What is blue?"}]
    cached, contexts = [], []
    for question in ("And green?", "And yellow?"):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_completion_tokens=4
        )
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        contexts.append(answer.usage.star["context_tokens"])
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": question},
        ]

    assert cached == [0, contexts[0]]
    assert contexts[1] > contexts[0] > 256


@pytest.mark.parametrize(
    ("star", "split", "query_tokens"),
    [
        ({"query_tokens": 5}, "fields", 5),
        ({"separator": "Here we go."}, "separator", 1),
        ({}, "last_tokens", 256),
        ({"mode": "exact"}, "last_tokens", 256),
    ],
)
def test_the_end_of_the_context_is_what_the_request_says(client, star, split, query_tokens):
    answer = client.completions.create(
        model=MODEL, prompt=DOCUMENT, max_tokens=1, extra_body={"star": star} if star else None
    )
    assert answer.usage.star["split"] == split
    assert answer.usage.star["query_tokens"] == query_tokens
    assert answer.usage.star["mode"] == star.get("mode", "star")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"extra_body": {"star": {"block_size": 0}}}, "star.block_size"),
        ({"extra_body": {"star": {"separator": "absent"}}}, "star.separator"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"top_p": 0.5, "extra_body": {"top_k": 3}}, "top_p"),
        ({"max_completion_tokens": 9000}, None),
    ],
)
def test_a_bad_field_is_named(client, change, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": MODEL, "messages": QUESTION} | change)
    assert error.value.param == param


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
