"""What agents send, in the templates of the models that they are for, against transformers' own rendering."""

import json

import pytest
from chat_templates import WITH_TOOLS
from pydantic import ValidationError
from small_tokenizers import CHATML, small_tokenizer

from megatron_star.config import FieldError
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.text.chat_template import Chat

NUM_QUERY_TOKENS = 40
TEMPLATES = WITH_TOOLS | {"chatml": CHATML}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
RESULT = '{"sky": "grey", "of": "Lisbon"}\n' * 12
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "the user wants the weather",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Lisbon", "days": 2}'},
        }
    ],
}
ANSWERED = {"role": "tool", "tool_call_id": "call00001", "content": RESULT}
CONVERSATION = [
    {"role": "system", "content": "You have tools. " * 12},
    {"role": "user", "content": "What is the weather in Lisbon? " + "one two three " * 30},
    CALL,
    ANSWERED,
    {"role": "assistant", "content": "It is grey."},
    {"role": "user", "content": "And in Oslo? " + "so on. " * 30},
    CALL,
    ANSWERED,
]
ASKED = [2, 4, 6, 8]
"""So many of these messages are there when an answer is asked for."""


@pytest.fixture(params=TEMPLATES)
def splitter(request):
    tokenizer = small_tokenizer("byte_level")
    tokenizer.chat_template = TEMPLATES[request.param]
    return PromptSplitter(tokenizer, NUM_QUERY_TOKENS, None, max_tokens=1 << 15)


def chat_of(messages: list[dict], **fields) -> Chat:
    """As the route makes it of a body."""
    return ChatRequest(model="m", messages=messages, **fields).chat(TOOLS)


def for_transformers(splitter, messages: list[dict]) -> list[dict]:
    """The same messages as a person would hand them to `apply_chat_template`."""
    wants_texts = splitter.tokenizer.chat_template == TEMPLATES["deepseek"]
    found = json.loads(json.dumps(messages))
    for message in found:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", ()):
            if not wants_texts:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return found


def expected(splitter, messages: list[dict], **options) -> list[int]:
    options = {"tools": TOOLS, "add_generation_prompt": True} | options
    return splitter.tokenizer.apply_chat_template(for_transformers(splitter, messages), **options)[
        "input_ids"
    ]


def all_tokens(split) -> list[int]:
    return split.context_tokens + split.query_tokens


@pytest.mark.parametrize("count", ASKED)
def test_tokens_are_those_of_transformers_with_tools_calls_and_results(splitter, count):
    messages = CONVERSATION[:count]
    found = splitter.split_chat(chat_of(messages), StarOptions())
    assert all_tokens(found) == expected(splitter, messages)


def test_a_long_result_is_context_and_its_end_is_the_query(splitter):
    found = splitter.split_chat(chat_of(CONVERSATION[:4]), StarOptions())
    assert (found.rule, len(found.query_tokens)) == ("last_tokens", NUM_QUERY_TOKENS)
    assert "Lisbon" in splitter.tokenizer.decode(found.context_tokens[-NUM_QUERY_TOKENS:])


def test_a_short_result_is_the_query_with_the_generation_prompt(splitter):
    splitter.num_query_tokens = 100
    messages = [*CONVERSATION[:3], ANSWERED | {"content": "grey"}]
    found = splitter.split_chat(chat_of(messages), StarOptions())
    assert found.rule == "last_message"
    assert splitter.tokenizer.decode(found.query_tokens).startswith("grey")


def test_a_growing_conversation_extends_what_was_encoded(splitter):
    found = [splitter.split_chat(chat_of(CONVERSATION[:count]), StarOptions()) for count in ASKED]
    changes_the_past = splitter.tokenizer.chat_template in (TEMPLATES["mistral"], TEMPLATES["qwen3"])
    for before, after in zip(found, found[1:], strict=False):
        if changes_the_past and after is found[2]:  # tools moved, or reasoning left out, by another question
            continue
        edges = (*before.turn_edges, len(before.context_tokens))
        assert after.context_tokens[: len(before.context_tokens)] == before.context_tokens
        assert (*after.turn_edges, len(after.context_tokens))[: len(edges)] == edges


def test_the_answer_continues_exactly_what_was_begun(splitter):
    messages = [*CONVERSATION[:4], {"role": "assistant", "content": "It is gr"}]
    chat = chat_of(messages, continue_final_message=True, add_generation_prompt=False)
    found = splitter.split_chat(chat, StarOptions())
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert all_tokens(found) == expected(splitter, messages, **options)
    assert splitter.tokenizer.decode(found.query_tokens).endswith("It is gr")


def test_what_was_begun_is_query_with_the_question_before_it(splitter):
    splitter.num_query_tokens = 100
    messages = [CONVERSATION[0], {"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "So"}]
    found = splitter.split_chat(chat_of(messages, continue_final_message=True), StarOptions())
    query = splitter.tokenizer.decode(found.query_tokens)
    assert found.rule == "last_message"
    assert query.startswith("Oslo?") and query.endswith("So")


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_the_last_message_may_be_anybodys(splitter, role):
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": "so"}, {"role": role, "content": "and?"}]
    found = splitter.split_chat(chat_of(messages), StarOptions())
    wanted = "developer" if "developer" in splitter.tokenizer.chat_template else "system"
    messages[-1]["role"] = wanted if role == "developer" else role
    assert all_tokens(found) == expected(splitter, messages)


def test_a_separator_is_found_in_a_tools_result(splitter):
    messages = [*CONVERSATION[:3], ANSWERED | {"content": 'a "document"\n###What changed?'}]
    found = splitter.split_chat(chat_of(messages), StarOptions(separator="###"))
    assert splitter.tokenizer.decode(found.query_tokens).startswith("What changed?")
    messages[-1]["content"] = messages[-1]["content"].replace("###", "")
    assert all_tokens(found) == expected(splitter, messages)


def with_template(name: str) -> PromptSplitter:
    tokenizer = small_tokenizer("byte_level")
    tokenizer.chat_template = TEMPLATES[name]
    return PromptSplitter(tokenizer, NUM_QUERY_TOKENS, None, max_tokens=1 << 15)


@pytest.mark.parametrize(
    ("template", "fields", "variables"),
    [
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ("qwen3", {"reasoning_effort": "none"}, {"enable_thinking": False}),
        ("gpt_oss", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ("chatml", {"reasoning_effort": "high"}, {}),
    ],
)
def test_a_template_is_told_what_it_asks_for(template, fields, variables):
    splitter = with_template(template)
    body = ChatRequest(model="m", messages=CONVERSATION[:2], **fields)
    found = splitter.split_chat(body.chat(TOOLS, effort=body.reasoning_effort), StarOptions())
    assert all_tokens(found) == expected(splitter, CONVERSATION[:2], **variables)


def test_without_a_generation_prompt_the_text_ends_with_the_last_message():
    splitter = with_template("qwen3")
    found = splitter.split_chat(chat_of(CONVERSATION[:2], add_generation_prompt=False), StarOptions())
    assert all_tokens(found) == expected(splitter, CONVERSATION[:2], add_generation_prompt=False)


def test_documents_go_where_the_template_has_a_place_for_them():
    splitter = with_template("chatml")
    documents = [{"title": "one", "text": "two"}]
    with pytest.raises(FieldError, match="documents: the chat template has no place for them"):
        splitter.split_chat(Chat(CONVERSATION[:2], documents=documents), StarOptions())
    splitter.tokenizer.chat_template = "{% for d in documents %}{{ d.text }}{% endfor %}" + CHATML
    found = splitter.split_chat(Chat(CONVERSATION[:2], documents=documents), StarOptions())
    assert splitter.tokenizer.decode(found.context_tokens).startswith("two")


@pytest.mark.parametrize("arguments", ["not JSON", "[1]", '{"a": 1', "[" * 20_000, ""])
def test_arguments_that_a_model_wrote_wrongly_come_back_as_they_are_or_are_refused(splitter, arguments):
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": "call00001", "type": "function", "function": function}]
    messages = [*CONVERSATION[:2], CALL | {"tool_calls": calls}, ANSWERED]
    try:
        found = splitter.split_chat(chat_of(messages), StarOptions())
    except FieldError as error:
        assert error.field == "messages" and splitter.tokenizer.chat_template == TEMPLATES["glm"]
    else:
        assert found.query_tokens


def test_messages_of_functions_are_those_of_tools():
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "x"},
    ]
    call, result = (chat_of(messages)).messages
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert result == {"role": "tool", "content": "x", "name": "f"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "content: it may be null"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id: only"),
        ({"messages": [CALL | {"role": "user", "content": "x"}]}, "tool_calls: only"),
        ({"messages": []}, "at least 1"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt=false"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize: it has a field of its own"),
        ({"chat_template_kwargs": {"messages": []}}, "messages: it has a field of its own"),
        ({"chat_template_kwargs": {"a b": 1}}, "no name that a template"),
        ({"chat_template_kwargs": {f"a{i}": 1 for i in range(65)}}, "at most 64"),
        ({"chat_template": "x" * (1 << 16) + "x"}, "at most 65536"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ],
)  # fmt: skip
def test_what_no_template_could_take_is_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        ChatRequest(**{"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields)
