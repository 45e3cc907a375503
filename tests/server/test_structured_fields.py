"""What bodies say of an answer's form: each way to say it is one grammar, two at once are refused."""

import json

import pytest
from pydantic import ValidationError

from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.completion_schema import CompletionRequest

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
NAMED = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
}


def asked(**fields):
    chat = ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], **fields)
    completion = CompletionRequest(model="m", prompt="x", **fields)
    assert chat.grammar() == completion.grammar()
    return chat.generation(1, default=1).grammar


@pytest.mark.parametrize(
    ("fields", "kind", "text", "field"),
    [
        ({"response_format": NAMED}, "json_schema", SCHEMA, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, "json_object", {"type": "object"}, "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA, "structured_outputs.json"),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            "json_schema",
            SCHEMA,
            "structured_outputs.json",
        ),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["é", "b"]}}, "choice", ["é", "b"], "structured_outputs.choice"),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            "lark",
            'start: "a"',
            "structured_outputs.grammar",
        ),
        (
            {"structured_outputs": {"json_object": True}},
            "json_object",
            {"type": "object"},
            "structured_outputs.json_object",
        ),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a"]}, "choice", ["a"], "guided_choice"),
        ({"guided_grammar": 'root ::= "a"'}, "lark", 'root ::= "a"', "guided_grammar"),
        (
            {"guided_json": {}, "guided_whitespace_pattern": " ?"},
            "json_schema",
            {"x-guidance": {"whitespace_pattern": " ?"}},
            "guided_json",
        ),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "json_schema",
            {"x-guidance": {"whitespace_pattern": ""}},
            "structured_outputs.json",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_whitespace_pattern": " "},
            "json_schema",
            {"type": "object", "x-guidance": {"whitespace_pattern": " "}},
            "response_format",
        ),
    ],
)
def test_each_way_to_ask_for_a_form_is_a_grammar_with_the_name_of_its_field(fields, kind, text, field):
    spec = asked(**fields)
    is_text = kind in ("regex", "lark")
    assert (spec.kind, spec.text if is_text else json.loads(spec.text), spec.field) == (kind, text, field)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"guided_json_object": False},
        {"guided_decoding_backend": "auto"},
    ],
)
def test_a_text_has_no_grammar(fields):
    assert asked(**fields) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"response_format": NAMED, "guided_regex": "a"},
            r"response_format.json_schema.schema: .* with guided_regex",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            r"structured_outputs.regex: .* structured_outputs.choice",
        ),
        ({"guided_json": {}, "guided_choice": ["a"]}, "guided_json: .* with guided_choice"),
        ({"structured_outputs": {}}, "one of json, regex, choice, grammar and json_object must be set"),
        ({"structured_outputs": {"structural_tag": "{}", "regex": "a"}}, "only null is supported here"),
        ({"structured_outputs": {"regex": "a", "backtrack": 1}}, "Extra inputs"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: it goes with type 'json_schema'"),
        ({"response_format": {"type": "text", "json_schema": {"name": "n"}}}, "json_schema: it goes with"),
        ({"guided_json": "[1]"}, "a JSON schema is an object"),
        ({"guided_json": "{"}, "it is no JSON schema"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": ""}, "at least 1"),
        ({"guided_choice": []}, "at least 1 item"),
        ({"guided_choice": ["a", 1]}, "valid string"),
        (
            {"guided_regex": "a", "guided_whitespace_pattern": " "},
            "whitespace_pattern: only where JSON is asked for",
        ),
        ({"guided_whitespace_pattern": " "}, "whitespace_pattern: only where JSON is asked for"),
        (
            {"guided_json": {"x-guidance": 3}, "guided_whitespace_pattern": " "},
            "x-guidance: it must be an object",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        asked(**fields)
