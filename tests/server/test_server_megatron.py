"""Megatron's wire, by a plain HTTP client."""

import httpx
import pytest

PROMPT = "The capital of France is"


def test_put_api_answers_as_megatrons_server_does(server):
    answer = server.put({"prompts": [PROMPT], "tokens_to_generate": 2, "top_k": 1, "logprobs": True})

    assert answer.status_code == 200
    body = answer.json()
    assert body["text"] == [f"{PROMPT} Paris."]
    assert body["segments"] == [["The", " capital", " of", " France", " is", " Paris", "."]]
    assert body["tokens"] == [[504, 3575, 282, 4649, 314, 7042, 30]]
    assert body["logprobs"][0][:4] == [None] * 4
    assert all(-1 < value <= 0 for value in body["logprobs"][0][4:])


def test_prompts_share_a_context_or_have_one_each(server):
    prompts = ["The sky is", "The grass is"]
    contexts = ["The sky is green. The grass is red. ", "The sky is red. The grass is black. "]
    request = {"prompts": prompts, "tokens_to_generate": 1, "top_k": 1}
    alone = [
        server.put(request | {"prompts": [prompt], "contexts": [context]}).json()["text"][0]
        for prompt, context in zip(prompts, contexts, strict=True)
    ]

    assert server.put(request | {"contexts": contexts}).json()["text"] == alone
    shared = server.put(request | {"contexts": contexts[:1]}).json()
    assert shared["text"][0] == alone[0]
    assert [star["split"] for star in shared["star"]] == ["fields"] * 2
    assert shared["star"][0]["context_tokens"] == shared["star"][1]["context_tokens"] > 0


def test_the_seed_the_stop_token_and_the_first_token_are_heeded(server):
    request = {"prompts": [PROMPT], "tokens_to_generate": 4, "random_seed": 3}
    first, second, other = (
        server.put(request | change).json() for change in ({}, {}, {"random_seed": 4, "temperature": 5.0})
    )
    stopped = server.put(request | {"top_k": 1, "stop_token": 7042}).json()
    with_bos = server.put(request | {"add_BOS": True}).json()

    assert first["text"] == second["text"] != other["text"]
    assert stopped["tokens"][0][-1] == 7042
    assert with_bos["tokens"][0][0] == 1


def test_stop_on_eol_stops_there(server):
    request = {"prompts": [PROMPT], "tokens_to_generate": 8, "top_k": 1}
    assert server.put(request | {"stop_on_eol": True}).json()["text"] == [f"{PROMPT} Paris."]


def test_post_completions_answers_as_megatrons_server_does(server):
    request = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    body = server.post("/completions", request).json()
    echoed = server.post(
        "/completions", request | {"echo": True, "stop": ".", "star": {"query_tokens": 2}}
    ).json()

    choice = body["choices"][0]
    assert (choice["index"], choice["text"]) == (0, " Paris.")
    assert choice["logprobs"]["tokens"] == [" Paris", "."]
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["text_offset"]) == 2
    assert echoed["choices"][0]["text"] == f"{PROMPT} Paris"
    logprobs = echoed["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert logprobs["text_offset"] == [0, 3, 11, 14, 21, 24, 30]
    assert logprobs["token_logprobs"][:5] == [None] * 5 and logprobs["token_logprobs"][5] < 0
    scored = server.post("/completions", request | {"echo": True, "logprobs": 1}).json()
    logprobs = scored["choices"][0]["logprobs"]
    first, *others = logprobs["token_logprobs"]
    assert first is None and len(others) == 6 and all(value < 0 for value in others)
    assert logprobs["top_logprobs"][0] is None and list(logprobs["top_logprobs"][5]) == [" Paris"]


def test_null_is_as_if_a_field_was_left_out(server):
    fields = ("tokens_to_generate", "temperature", "top_k", "top_p", "random_seed", "stop_token", "logprobs")
    empty = dict.fromkeys((*fields, "stop_on_eol", "add_BOS", "beam_width", "contexts", "star"))
    answer = server.put({"prompts": [PROMPT]} | empty | {"tokens_to_generate": 2, "top_k": 1})
    assert answer.json()["text"] == [f"{PROMPT} Paris."]
    assert server.put({"prompts": [PROMPT], "unheard_of": None}).status_code == 400


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompts": "text"}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [""]}, "prompts"),
        ({"prompts": ["x"] * 129}, "prompts"),
        ({"contexts": ["a", "b"]}, None),
        ({"tokens_to_generate": 0}, "tokens_to_generate"),
        ({"tokens_to_generate": 2.5}, "tokens_to_generate"),
        ({"temperature": -1}, "temperature"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"stop_token": -1}, "stop_token"),
        ({"random_seed": 1 << 70}, "random_seed"),
        ({"beam_width": 4}, "beam_width"),
        ({"max_len": 4}, "max_len"),
        ({"debug_fname": "/tmp/x"}, "debug_fname"),
    ],
)
def test_a_bad_field_has_status_400_and_is_named(server, change, field):
    answer = server.put({"prompts": [PROMPT]} | change)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert answer.json()["message"]


def test_a_missing_field_and_a_body_that_is_not_json_have_status_400(server):
    assert server.put({}).json()["error"]["param"] == "prompts"
    headers = {"Content-Type": "application/json"}
    for content in (
        b"{",
        b'{"prompts": ["\xff"]}',
        b"[" * 100_000,
        b'{"prompts": ["\\ud800"]}',
        b"",
        b"null",
    ):
        assert httpx.put(f"{server.url}/api", content=content, headers=headers).status_code == 400
