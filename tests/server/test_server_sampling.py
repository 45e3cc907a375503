"""Rules of tokens, and what is told of tokens: against transformers' `generate`, and field by field."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of"
END = 2
"""SmolLM2's <|im_end|>."""


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2[0])


def complete(server, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "smollm2",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 12,
        "star": {"mode": "exact"},
    }
    response = server.post("/v1/completions", body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return answer["choices"][0]["token_ids"]


def streamed(server, route: str, **fields: Any) -> list[dict[str, Any]]:

    body = {"model": "smollm2", "temperature": 0, "max_tokens": 5, "stream": True} | fields
    lines = server.post(route, body).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


class CountedPenalties(LogitsProcessor):
    """OpenAI's definition of frequency and presence penalties; transformers has none."""

    def __init__(self, num_prompt_tokens: int, frequency: float, presence: float) -> None:
        self.num_prompt_tokens, self.frequency, self.presence = num_prompt_tokens, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.num_prompt_tokens :], minlength=scores.size(1))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def test_greedy_answers_with_rules_are_those_of_transformers(server, smollm2, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2[0], dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    plain = tokens_of(complete(server, return_token_ids=True))
    bad_word = tokenizer.decode(plain[3:5])
    told = complete(server, logprobs=2, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    biased = int([*told["top_logprobs"][0]][1].removeprefix("token_id:"))
    for rules, processors in (
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        (
            {"repetition_penalty": 0.7, "logit_bias": {str(biased): 6.0}},
            {"repetition_penalty": 0.7, "sequence_bias": [[[biased], 6.0]]},
        ),
        (
            {"frequency_penalty": 0.4, "presence_penalty": 1.5},
            {"logits_processor": [CountedPenalties(prompt.input_ids.size(1), 0.4, 1.5)]},
        ),
        ({"bad_words": [bad_word]}, {"bad_words_ids": [plain[3:5]]}),
        ({"min_tokens": 12, "repetition_penalty": 1.1}, {"min_new_tokens": 12, "repetition_penalty": 1.1}),
    ):
        expected = model.generate(**prompt, max_new_tokens=12, do_sample=False, **processors)
        expected = expected[0, prompt.input_ids.size(1) :].tolist()
        answer = tokens_of(complete(server, return_token_ids=True, **rules))
        assert answer == expected, rules
        assert bool(rules) == (answer != plain), rules


def test_speculated_answers_with_penalties_are_those_of_one_token_a_step(server):
    fields = {"prompt": "1, 1, " * 40, "max_tokens": 48, "frequency_penalty": 0.6, "return_token_ids": True}
    answers = [complete(server, **fields, star={"speculate": how}) for how in ("lookup", "off")]
    assert tokens_of(answers[0]) == tokens_of(answers[1])
    assert answers[0]["usage"]["star"]["accepted_tokens"] > 0


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/completions"])
def test_only_allowed_tokens_come_on_every_route(server, tokenizer, route):
    allowed = tokenizer.encode(" yes no", add_special_tokens=False)
    asked = {"messages": QUESTION} if "chat" in route else {"prompt": PROMPT}
    body = {"model": "smollm2", "max_tokens": 5, "allowed_token_ids": allowed} | asked
    choice = server.post(route, body).json()["choices"][0]
    text = choice["message"]["content"] if "chat" in route else choice["text"]
    assert len(text.split()) == 5 and set(text.split()) <= {"yes", "no"}


def test_tokens_that_rules_leave_none_of_are_refused_early_or_end_the_answer(server):
    body = {"model": "smollm2", "prompt": PROMPT, "allowed_token_ids": [END], "max_tokens": 4}
    refused = server.post("/v1/completions", body | {"min_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "allowed_token_ids")
    ended = server.post("/v1/completions", body | {"allowed_token_ids": [504], "bad_words": ["TheThe"]})
    assert ended.status_code == 400 and "leaves no token" in ended.json()["message"]


def test_a_chat_tells_twenty_likeliest_tokens_and_the_chosen_one_among_them(server):
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 4, "temperature": 2.0, "seed": 5}
    told = {"logprobs": True, "top_logprobs": 20}
    content = server.post("/v1/chat/completions", body | told).json()["choices"][0]["logprobs"]["content"]
    for token in content:
        values = [top["logprob"] for top in token["top_logprobs"]][:20]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert (token["token"], token["logprob"]) in [
            (t["token"], t["logprob"]) for t in token["top_logprobs"]
        ]
    by_id = server.post("/v1/chat/completions", body | told | {"return_tokens_as_token_ids": True}).json()
    ids = by_id["choices"][0]["logprobs"]["content"]
    assert all(token["token"].startswith("token_id:") for token in ids)
    assert [token["bytes"] for token in ids] == [token["bytes"] for token in content]


def test_logprobs_of_completions_are_of_the_chosen_token_alone_or_with_likelier_ones(server):
    for count in (0, 1, 20):
        answer = complete(server, logprobs=count, max_tokens=3, temperature=1.5, seed=2)
        logprobs = answer["choices"][0]["logprobs"]
        for token, value, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == value
            assert len(top) in ({1} if count == 0 else {count, count + 1})


def test_token_ids_are_given_whole_and_streamed(server, tokenizer):
    prompts = [PROMPT, "One, two,"]
    whole = complete(
        server, prompt=prompts, n=2, temperature=1.0, seed=1, max_tokens=5, return_token_ids=True
    )
    chunks = streamed(
        server, "/v1/completions", prompt=prompts, n=2, temperature=1.0, seed=1, return_token_ids=True
    )
    ids, of_prompts = [[], [], [], []], {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if choice["index"] not in of_prompts:
            of_prompts[choice["index"]] = choice["prompt_token_ids"]
        else:
            assert "prompt_token_ids" not in choice
        ids[choice["index"]] += choice["token_ids"]
    for index, choice in enumerate(whole["choices"]):
        expected = tokenizer.encode(prompts[index // 2], add_special_tokens=False)
        assert choice["prompt_token_ids"] == of_prompts[index] == expected
        assert choice["token_ids"] == ids[index] and len(ids[index]) == 5


def test_a_chats_token_ids_are_those_of_its_template_and_end_with_the_end_token(server, tokenizer):
    fields = {"messages": QUESTION, "max_tokens": 20, "return_token_ids": True}
    body = {"model": "smollm2", "temperature": 0} | fields
    whole = server.post("/v1/chat/completions", body).json()
    chunks = streamed(server, "/v1/chat/completions", **fields)
    expected = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == expected
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    ids = whole["choices"][0]["token_ids"]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == ids
    assert ids[-1] == END


def test_an_answer_may_have_what_ended_it_and_special_tokens(server):
    def content(**fields: Any) -> str:
        body = {"model": "smollm2", "messages": QUESTION, "temperature": 0} | fields
        return server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]

    def pieces(**fields: Any) -> str:
        chunks = streamed(server, "/v1/chat/completions", messages=QUESTION, max_tokens=20, **fields)
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    for fields, expected in (
        ({"stop": ["tal of", "Paris"], "include_stop_str_in_output": True}, "The capital of"),
        ({"stop": ["tal of", "Paris"]}, "The capi"),
        (
            {"stop": ["<|im_end|>"], "include_stop_str_in_output": True},
            "The capital of France is Paris.<|im_end|>",
        ),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            "The capital of France is Paris.<|im_end|>",
        ),
        ({"skip_special_tokens": False}, "The capital of France is Paris."),
        ({"stop_token_ids": [282]}, "The capital"),
    ):
        assert content(**fields) == expected
        assert pieces(**fields) == expected
    ignoring = content(ignore_eos=True, skip_special_tokens=False, max_tokens=9)
    assert ignoring.startswith("The capital of France is Paris.<|im_end|>\n")


def test_the_best_of_several_answers_are_given_by_their_log_probability(server):
    drawn = {"temperature": 1.5, "seed": 11, "max_tokens": 6, "logprobs": 0}
    each = complete(server, **drawn, n=4)
    best = complete(server, **drawn, n=2, best_of=4)

    def total(choice: dict[str, Any]) -> float:
        return sum(choice["logprobs"]["token_logprobs"])

    expected = sorted(each["choices"], key=total, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in expected]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == each["usage"]["completion_tokens"]


def test_a_prompt_is_cut_to_its_last_tokens(server, tokenizer):
    tokens = tokenizer.encode(PROMPT, add_special_tokens=False)
    cut = complete(server, truncate_prompt_tokens=5, return_token_ids=True, star={"query_tokens": 3})
    alone = complete(server, prompt=tokens[-5:], return_token_ids=True, star={"query_tokens": 3})
    assert cut["choices"] == alone["choices"]
    assert cut["usage"]["prompt_tokens"] == 5
    assert cut["usage"]["star"]["query_tokens"] == 3
    whole = complete(server, truncate_prompt_tokens=-1, return_token_ids=True)
    assert whole["choices"][0]["prompt_token_ids"] == tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [999999]}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words.0"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 1, "n": 2}, None),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_field(server, fields, param):
    refused = server.post("/v1/completions", {"model": "smollm2", "prompt": PROMPT} | fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
