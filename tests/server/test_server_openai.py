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
    assert [model.id for model in client.models.list()] == [MODEL, "other-name"]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_is_answered_whole(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)

    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    star = answer.usage.star
    assert star["split"] == "last_message"
    assert answer.usage.prompt_tokens == star["context_tokens"] + star["query_tokens"]
    assert [*star["kv_bytes"]] == ["full"] and star["kv_bytes"]["full"] > 0


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
        model=MODEL, prompt="The capital of France is", temperature=0, logprobs=1, max_tokens=2
    )

    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content) == ANSWER + "<|im_end|>"
    assert all(-5 < token.logprob <= 0 for token in content)
    assert plain.choices[0].text == " Paris."
    logprobs = plain.choices[0].logprobs
    assert (logprobs.tokens, logprobs.text_offset) == ([" Paris", "."], [0, 6])
    chosen = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    assert logprobs.top_logprobs == [{token: value} for token, value in chosen]


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


def test_the_sizes_that_were_used_give_the_same_encoding_and_other_passed_keys_another(client):
    def ask(**star):
        messages = [{"role": "user", "content": f"{DOCUMENT}###What is red?"}]
        asked = {"extra_body": {"star": {"separator": "###", **star}}, "max_completion_tokens": 1}
        return client.chat.completions.create(model=MODEL, messages=messages, **asked).usage.star

    first = ask(block_size=200, anchor_size=20, passed_keys=16)
    assert first["sizes"] == {"block_size": 200, "anchor_size": 20, "passed_keys": 16}
    assert "full" in first["kv_bytes"]  # and copies of passed keys, where a wave spreads a block over ranks
    other = ask(block_size=200, anchor_size=20, passed_keys=8)
    assert not first["cache_hit"] and not other["cache_hit"] and other["sizes"]["passed_keys"] == 8
    assert ask(**first["sizes"])["cache_hit"]


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
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"extra_body": {"star": {"block_size": 0}}}, "star.block_size"),
        ({"extra_body": {"star": {"passed_keys": -1}}}, "star.passed_keys"),
        ({"extra_body": {"star": {"passed_keys": 0.5}}}, "star.passed_keys"),
        ({"extra_body": {"star": {"passed_keys": (1 << 24) + 1}}}, "star.passed_keys"),
        ({"extra_body": {"star": {"separator": "absent"}}}, "star.separator"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"max_completion_tokens": 9000}, None),
        ({"max_completion_tokens": 4, "max_tokens": 5}, None),
        ({"max_completion_tokens": 4, "extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"extra_body": {"min_p": 1.1}}, "min_p"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"top_logprobs": 1}, None),
    ],
)
def test_a_bad_field_is_named(client, change, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": MODEL, "messages": QUESTION} | change)
    assert error.value.param == param


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)


@pytest.mark.parametrize("form", [lambda message: message, lambda message: message.model_dump()])
def test_the_usual_loop_of_the_client_asks_again_with_the_answers_as_they_are(client, form):
    messages: list = []
    answers: list[str] = []
    for question in ("What is the capital of France?", "And of Italy?", "a"):
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_completion_tokens=8
        )
        answers.append(answer.choices[0].message.content)
        messages.append(form(answer.choices[0].message))
    assert answers[0] == ANSWER and all(answers)
    assert answer.usage.star["split"] == "last_message"


def test_an_answer_that_was_put_together_from_a_stream_is_sent_back_as_it_is(client):
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == ANSWER
    again = [*QUESTION, message, {"role": "user", "content": "Why?"}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_completion_tokens=1).choices


def test_an_answer_goes_on_after_the_end_token_where_that_is_ignored(client):
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 12}
    ended = client.chat.completions.create(**asked)
    ignored = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    at_least = client.chat.completions.create(**asked, extra_body={"min_tokens": 10})

    assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (8, "stop")
    assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (12, "length")
    assert 10 <= at_least.usage.completion_tokens <= 12
    assert ignored.choices[0].message.content.startswith(ANSWER)


def test_further_end_tokens_end_an_answer_and_are_no_part_of_it(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, extra_body={"stop_token_ids": [30]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" Paris", "stop")


def test_counts_come_with_every_chunk_where_that_is_asked(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = {"model": MODEL, "messages": QUESTION, "temperature": 0, "stream": True}
    chunks = list(client.chat.completions.create(**request, stream_options=options))
    without = list(client.chat.completions.create(**request, stream_options={"include_usage": True}))

    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 8)
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}
    assert all(chunk.usage is None for chunk in without[:-1]) and without[-1].usage.completion_tokens == 8


def test_a_top_p_of_nothing_leaves_the_most_likely_token(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=2, top_p=0, max_tokens=2
    )
    assert answer.choices[0].text == " Paris."


def test_a_prompt_alone_is_scored_as_lm_eval_asks_for_it(client):
    """Of two prompts, whole: the first token follows nothing; likely ones have the chosen one among them."""
    answer = client.completions.create(
        model=MODEL,
        prompt=[[504, 3575, 282, 4649, 314], [504]],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    first, second = (choice.logprobs for choice in answer.choices)
    assert first.token_logprobs[0] is None and first.top_logprobs[0] is None
    assert len(first.token_logprobs) == 6 and len(second.token_logprobs) == 2
    for value, top in zip(first.token_logprobs[1:], first.top_logprobs[1:], strict=True):
        assert value in top.values() and value <= max(top.values())
    nothing = client.completions.create(
        model=MODEL, prompt="The capital of", max_tokens=0, extra_body={"prompt_logprobs": 2}
    )
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == ("", 0)
    scores = nothing.choices[0].prompt_logprobs
    assert scores[0] is None and [score["rank"] for score in scores[1].values()][:2] == [1, 2]
    with pytest.raises(openai.BadRequestError, match="whole answers only"):
        client.completions.create(model=MODEL, prompt="x", stream=True, extra_body={"prompt_logprobs": 0})
