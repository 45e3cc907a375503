"""Answers that must look like something, of a real model: each one does, whatever runs beside it."""

import json
from typing import Any

import jsonschema_rs
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
sum ::= term ("+" term)*
term ::= [0-9] | "(" sum ")"
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
    for seed, temperature in ((0, 0.0), (1, 1.0), (2, 2.0)):
        text = ask(server, response_format=json_format(SCHEMAS[name]), seed=seed, temperature=temperature)
        jsonschema_rs.validate(SCHEMAS[name], json.loads(text), validate_formats=True)
