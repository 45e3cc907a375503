"""What a request says of tools is checked and bounded, and becomes an offer."""

import json

import pytest
from pydantic import ValidationError

from megatron_star.server.wires.chat_schema import ChatRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "get_weather", **function) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


WEATHER, NOW = tool(parameters=SCHEMA, description="Of a city."), tool("now", strict=True)
ONE = {"type": "function", "function": {"name": "now"}}


def asked(**fields) -> ChatRequest:
    return ChatRequest(**CHAT, **fields)


def allowed(mode: str, *names: str) -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def deep(levels: int) -> dict:
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return tool(parameters={"type": "object", "properties": schema})


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        (None, ["get_weather", "now"], False),
        ("auto", ["get_weather", "now"], False),
        ("none", [], False),
        ("required", ["get_weather", "now"], True),
        (ONE, ["now"], True),
        (allowed("auto", "now"), ["now"], False),
        (allowed("required", "now", "get_weather"), ["get_weather", "now"], True),
    ],
)
def test_a_choice_says_what_may_be_called_and_whether_it_must(choice, names, must_call):
    body = asked(tools=[WEATHER, NOW], tool_choice=choice)
    offer = body.offer()
    assert [*offer.tools] == names and offer.must_call is must_call
    assert offer.most_calls == (1 if choice == ONE else None)
    shown = body.tools_for_template()
    assert [t["function"]["name"] for t in shown or []] == names
    if "get_weather" in names:
        assert offer.tools["get_weather"] == SCHEMA and WEATHER in shown


def test_without_parallel_calls_there_is_one_and_reasoning_may_be_left_out():
    assert asked(tools=[NOW], parallel_tool_calls=False).offer().most_calls == 1
    assert asked().offer().with_reasoning
    assert not asked(include_reasoning=False).offer().with_reasoning


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [tool("a b")]}, "pattern"),
        ({"tools": [tool("")]}, "pattern"),
        ({"tools": [tool("now\n")]}, "pattern"),
        ({"tools": [tool("x" * 129)]}, "128"),
        ({"tools": [NOW] * 2}, "same name"),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "128"),
        ({"tools": [tool(parameters={"type": "array"})]}, "'object'"),
        (
            {"tools": [tool(parameters={"description": "x" * 70000})]},
            "70019 bytes as JSON; the limit is 65536",
        ),
        ({"tools": [tool(parameters={"description": "\ud800"})]}, "surrogates not allowed"),
        ({"tools": [tool(parameters={"maximum": float("nan")})]}, "not JSON compliant"),
        ({"tools": [tool(description="\ud800")]}, "surrogate"),
        ({"tools": [deep(31)]}, "more than 32 levels"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "function"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": ONE}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": ONE}, "there is no tool 'now'"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto", "now")}, "there is no tool 'now'"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto")}, "at least 1"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "'none', 'auto' or 'required'"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        asked(**fields)


def test_a_schema_of_a_thousand_levels_is_refused_like_one_of_forty():
    with pytest.raises(ValidationError, match="more than 32 levels"):
        asked(tools=[deep(5000)])


def test_a_schema_at_its_bounds_is_taken():
    asked(tools=[deep(30)])
    text = "x" * (65536 - len(json.dumps({"description": ""})))
    asked(tools=[tool(parameters={"description": text})])
