"""Chat templates that come with a request: bounded in time and memory, and the server's own from a file."""

from time import monotonic

import pytest
from chat_templates import WITH_TOOLS
from small_tokenizers import CHATML, small_tokenizer

from megatron_star.config import FieldError
from megatron_star.programs.serve import parse_arguments
from megatron_star.programs.server_arguments import server_settings
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.star_options import StarOptions
from megatron_star.text.chat_template import Chat
from megatron_star.text.foreign_template import ForeignTemplate, TemplateProcess

MESSAGES = [{"role": "user", "content": "Hi"}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
AGENT = [
    *MESSAGES,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "x", "tool_call_id": "call00001"},
]


@pytest.fixture(scope="module")
def process():
    return TemplateProcess()


@pytest.fixture(scope="module")
def splitter():
    return PromptSplitter(small_tokenizer("byte_level"), 40, None, max_tokens=8192)


def tokens(splitter, process, template: str, messages: list[dict], **fields) -> list[int]:
    chat = Chat(messages, template=ForeignTemplate(template, process), **fields)
    found = splitter.split_chat(chat, StarOptions())
    return found.context_tokens + found.query_tokens


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_requests_template_writes_what_it_would_as_the_models_own(splitter, process, name):
    own = small_tokenizer("byte_level")
    own.chat_template = WITH_TOOLS[name]
    expected = PromptSplitter(own, 40, None, max_tokens=8192).split_chat(Chat(AGENT), StarOptions())
    assert (
        tokens(splitter, process, WITH_TOOLS[name], AGENT) == expected.context_tokens + expected.query_tokens
    )


def test_a_requests_template_continues_a_message_and_takes_variables(splitter, process):
    template = "{{ greeting }}" + CHATML
    messages = [*MESSAGES, {"role": "assistant", "content": "Hel"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    found = tokens(splitter, process, template, messages, variables={"greeting": "so"}, **options)
    expected = splitter.tokenizer.apply_chat_template(
        messages, chat_template=template, greeting="so", **options
    )
    assert found == expected["input_ids"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        ("{{ 'x' * 10000000000 }}", "MemoryError"),
        ("{{ 'x' * 34000000 }}", "the limit is 33554432"),
        ("{% set x = namespace(y='x' * 1000000) %}{% for a in range(99999) %}"
         "{% set x.y = x.y + x.y %}{% endfor %}", "MemoryError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for %}", "Expected|unexpected|expected"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{{ 1 / 0 }}", "division"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_end_or_takes_all_memory_is_stopped(splitter, process, template, reason):
    start = monotonic()
    with pytest.raises(FieldError, match=reason):
        tokens(splitter, process, template, MESSAGES)
    assert monotonic() - start < 30
    assert tokens(splitter, process, CHATML, MESSAGES)  # the next request is answered


def settings(tmp_path, template: str | bytes, *arguments: str):
    (tmp_path / "template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    given = ["--load", str(tmp_path), "--chat-template", str(tmp_path / "template.jinja"), *arguments]
    return server_settings(parse_arguments(given))


def test_a_template_of_ones_own_comes_from_a_file(tmp_path):
    assert settings(tmp_path, CHATML).chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ bos_token }}\n{% for %}", "template.jinja: it is no chat template: line 2"),
        ("{{ 1 | no_such_filter }}", "no_such_filter"),
        (b"\xff\xfe{", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_template_is_refused_at_the_start(tmp_path, template, reason):
    with pytest.raises(ValueError, match=reason):
        settings(tmp_path, template)
