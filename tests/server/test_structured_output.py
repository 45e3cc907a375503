"""Answers that must look like something, of a real model: each one does, whatever runs beside it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema_rs
import openai
import pydantic
import pytest
from running_server import RunningServer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["captain", "cook", 3, None]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "nested": {
        "type": "object",
        "properties": {
            "crew": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
            "ok": {"const": True},
        },
        "required": ["ok", "crew"],
        "additionalProperties": False,
    },
    "definitions": {
        "$defs": {
            "place": {"type": "array", "items": {"$ref": "#/$defs/part"}, "minItems": 2, "maxItems": 2},
            "part": {"type": "integer", "minimum": -90, "maximum": 90},
        },
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "unicode": {"enum": ["Zürich", "東京", '😀 "quoted" \\ back', "Łódź\n"]},
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "multipleOf": 7, "minimum": -50, "maximum": 50},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        ],
        "items": False,
        "minItems": 2,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "formats": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "id": {"type": "string", "format": "uuid"},
        },
        "required": ["day", "id"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {
            "a": {"type": "boolean"},
            "b": {"type": "null"},
            "c": {"type": "string", "maxLength": 3},
        },
        "additionalProperties": False,
    },
    "bounded array": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 5},
    "one of": {
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    "kind": {"const": kind},
                    "size": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["kind", "size"],
                "additionalProperties": False,
            }
            for kind in ("circle", "square")
        ]
    },
    "free keys": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99},
        "maxProperties": 2,
    },
}
EBNF = """
root ::= sum
sum ::= term ("+" term){1,3}
term ::= [0-9]{1,2} | "(" [0-9] ")"
"""
LARK = """
start: greeting " " NAME "!"
greeting: "Hello" | "Good day"
NAME: /[A-Z][a-z]{2,8}/
"""


def ask(server: RunningServer, **fields: Any) -> str:
    """The text of a greedy answer that ended by itself."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Tell me about the crew of the ship."}],
        "max_tokens": 400,
        "temperature": 0,
    }
    response = server.post("/v1/chat/completions", body | fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"]


def json_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_valid_by_the_schema_that_was_asked_for(server, name):
    for seed, temperature in ((0, 0.0), (1, 1.0)):
        text = ask(server, response_format=json_format(SCHEMAS[name]), seed=seed, temperature=temperature)
        jsonschema_rs.validate(SCHEMAS[name], json.loads(text), validate_formats=True)


def test_a_regular_expression_matches_all_of_the_answer(server):
    text = ask(
        server, guided_regex=r"(Dr|Ms)\. [A-Z][a-z]{2,8} has [0-9]{1,3} ships?", temperature=1.0, seed=3
    )
    assert re.fullmatch(r"(Dr|Ms)\. [A-Z][a-z]{2,8} has [0-9]{1,3} ships?", text)


def test_an_answer_is_one_of_the_choices(server):
    choices = ["positive", 'nega"tive', "Zürich 😀", "a\\b"]
    assert ask(server, structured_outputs={"choice": choices}, temperature=2.0, seed=1) in choices


def test_answers_follow_grammars_of_both_dialects(server):
    assert re.fullmatch(r"(Hello|Good day) [A-Z][a-z]{2,8}!", ask(server, guided_grammar=LARK))
    assert re.fullmatch(
        r"[0-9+()]+", ask(server, structured_outputs={"grammar": EBNF}, temperature=1.0, seed=5)
    )


def test_any_object_is_an_object(server):
    assert isinstance(json.loads(ask(server, response_format={"type": "json_object"}, seed=2)), dict)


def test_guesses_change_no_answer_and_forced_tokens_are_guessed(server):
    schema = {
        "const": {"a_long_name_of_a_property": "and its only value, which is long too", "n": [1, 2, 3, 4]}
    }
    texts = []
    for speculate in ("lookup", "off"):
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Go on."}], "temperature": 0}
        form = {"json": schema, "disable_any_whitespace": True}
        fields = {
            "structured_outputs": form,
            "star": {"speculate": speculate},
            "max_tokens": 120,
        }
        answer = server.post("/v1/chat/completions", body | fields).json()
        texts.append(answer["choices"][0]["message"]["content"])
        accepted = answer["usage"]["star"]["accepted_tokens"]
        assert bool(accepted) == (speculate == "lookup")
    assert json.loads(texts[0]) == schema["const"] and texts[0] == texts[1]


def test_answers_of_all_forms_and_of_none_run_side_by_side(server):
    forms = [
        {"response_format": json_format(PERSON)},
        {"guided_regex": "[a-c]{30}"},
        {},
        {"guided_choice": ["x", "y"]},
    ]
    alone = [_text(server, form) for form in forms]
    with ThreadPoolExecutor(len(forms)) as pool:
        assert list(pool.map(lambda form: _text(server, form), forms)) == alone


def _text(server: RunningServer, fields: dict[str, Any]) -> str:
    body = {"model": "smollm2", "prompt": "The captain of the ship is", "max_tokens": 48, "temperature": 0}
    return server.post("/v1/completions", body | fields).json()["choices"][0]["text"]


def test_several_choices_log_probabilities_and_a_stream_keep_to_the_form(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    common = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Say a code."}],
        "temperature": 1.0,
        "seed": 4,
    }
    form = {"extra_body": {"guided_regex": "[A-Z]{3}[0-9]{3}"}}
    whole = client.chat.completions.create(**common, **form, n=3, logprobs=True, top_logprobs=2)
    assert all(re.fullmatch("[A-Z]{3}[0-9]{3}", choice.message.content) for choice in whole.choices)
    assert all(len(token.top_logprobs) >= 2 for token in whole.choices[0].logprobs.content)
    stream = client.chat.completions.create(**common, **form, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content


def test_the_limit_of_tokens_cuts_a_form_and_says_so(server):
    body = {"model": "smollm2", "prompt": "x", "max_tokens": 3, "guided_regex": "[a-z ]{200}"}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["text"]


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 20}, {"stop": ["nothing"]}])
def test_a_whole_answer_ends_whatever_else_was_asked(server, fields):
    assert ask(server, guided_choice=["yes", "no"], **fields) in ("yes", "no")


def test_the_openai_client_parses_a_model_of_pydantic(server):
    class Ship(pydantic.BaseModel):
        kind: Literal["brig", "sloop"]
        guns: int = pydantic.Field(ge=0, le=99)
        home: str | None = pydantic.Field(max_length=10)

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.parse(
        model="smollm2",
        messages=[{"role": "user", "content": "Which ship?"}],
        response_format=Ship,
        max_tokens=200,
    )
    assert isinstance(answer.choices[0].message.parsed, Ship)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"guided_json": {"enum": ["x" * (1 << 20)]}}, "guided_json", "the limit is 262144"),
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            None,
            "guided_regex: it cannot be together with guided_choice",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_it_runs(server, fields, param, reason):
    for stream in (False, True):
        response = server.post(
            "/v1/completions", {"model": "smollm2", "prompt": "x", "stream": stream} | fields
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param) and reason in error["message"]


def test_a_grammar_that_becomes_too_complex_ends_its_answer_alone(server):
    many = {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(1000)}}
    body = {"model": "smollm2", "prompt": "x", "guided_json": many, "max_tokens": 64}
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(_text, server, {"guided_regex": "[a-c]{40}"})
        response = server.post("/v1/completions", body)
        assert response.status_code == 400
        assert "cannot follow its grammar" in response.json()["error"]["message"]
        assert re.fullmatch("[a-c]+", beside.result())
