"""Which formats a model uses shows in its chat template, or is named."""

from types import SimpleNamespace

import pytest
from small_tokenizers import small_tokenizer
from tokenizers import AddedToken

from megatron_star.server.ask import Generation
from megatron_star.server.tools.formats import CALL_NAMES, REASONING_NAMES, answer_formats
from megatron_star.server.tools.offer import Offer
from megatron_star.server.tools.tool_use import ToolUse
from megatron_star.text.text_stream import TextStream

TEMPLATES = {
    # Parts that tell, as the templates of these families have them.
    '{{\'<tool_call>\\n{"name": "\' + tool_call.name + \'", "arguments": \'}}': ("hermes", None),
    "<tool_call> {% if '</think>' in content %}{{ '<think>\\n' }}{% endif %}": ("hermes", "qwen3"),
    "{{ '<tool_call>\\n<function=' + name + '>\\n<parameter=' }}": ("qwen3_coder", None),
    '{{- \'{"name": "\' + name + \'", "parameters": \' }} Respond in the format '
    '{"name": function name, "parameters": dictionary of argument name and its value}.': (
        "llama3_json",
        None,
    ),
    "{{ '<|python_tag|>' + tool_call.name + '.call(' }}": ("llama3_json", None),
    "{{ '[TOOL_CALLS][' }} {{ '[/TOOL_RESULTS]' }}": ("mistral", None),
    "{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }} [THINK]": ("mistral_v11", "mistral"),
    "<tool_call>{{ tc.name }} <arg_key>{{ k }}</arg_key> <think></think>": ("glm45", "qwen3"),
    "{{'<｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '\\n```json\\n'}} </think>": (
        "deepseek_v3",
        "qwen3",
    ),
    "{{'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments}} {{'</think>'}}": (
        "deepseek_v31",
        "qwen3",
    ),
    "{{ '<|start|>assistant<|channel|>final<|message|>' }}": ("openai", None),
    "{{ message.content }}": (None, None),
}


def template(text: str | dict | None) -> SimpleNamespace:
    return SimpleNamespace(chat_template=text)


def found(formats) -> tuple[str | None, str | None]:
    return (
        formats.calls.names[0] if formats.calls else None,
        formats.reasoning.names[0] if formats.reasoning else None,
    )


@pytest.mark.parametrize(("text", "names"), TEMPLATES.items())
def test_a_template_shows_its_formats(text, names):
    assert found(answer_formats(template(text), "auto", "auto")) == names
    assert found(answer_formats(template({"default": "x", "tool_use": text}), "auto", "auto")) == names


def test_a_name_or_off_goes_before_the_template():
    text = next(text for text, names in TEMPLATES.items() if names == ("hermes", "qwen3"))
    assert found(answer_formats(template(text), "mistral", "off")) == ("mistral", None)
    assert found(answer_formats(template(text), "off", "deepseek_r1")) == (None, "deepseek_r1")
    assert found(answer_formats(template(None), "auto", "auto")) == (None, None)
    assert found(answer_formats(template(text), "openai", "auto")) == ("openai", None)
    assert found(answer_formats(template(text), "auto", "openai_gptoss")) == ("openai", None)


def test_every_name_on_the_command_line_is_a_format():
    for name in CALL_NAMES:
        if name != "openai":
            assert name in answer_formats(template(None), name, "off").calls.names
    for name in REASONING_NAMES:
        if name != "openai_gptoss":
            assert name in answer_formats(template(None), "off", name).reasoning.names


@pytest.mark.parametrize("names", [("openai", "off"), ("openai", "qwen3"), ("hermes", "openai_gptoss")])
def test_harmony_tells_both_or_nothing(names):
    with pytest.raises(ValueError, match="one format"):
        answer_formats(template(None), *names)


@pytest.fixture
def tokenizer():
    """Some of Mistral's marks are special tokens, beside those that chats have."""
    tokenizer = small_tokenizer("byte_level")
    marks = [AddedToken(mark, special=True) for mark in ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = "[TOOL_CALLS][ARGS][THINK]"
    return tokenizer


def text_of(tokenizer, generation: Generation, tokens: list[int]) -> str:
    """As the engine makes it of the tokens."""
    stream = TextStream(tokenizer, skip_special_tokens=generation.skip_special_tokens)
    for token in tokens:
        if token not in generation.hidden_tokens:
            stream.add(token)
    return stream.text


def test_marks_that_are_special_tokens_are_seen_and_no_others(tokenizer):
    use = ToolUse(answer_formats(tokenizer, "auto", "auto"), tokenizer)
    text = "[THINK]so[/THINK]<s>the[TOOL_CALLS]now[ARGS]{}<|im_end|>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    plain = Generation(num_tokens=1)
    with_tools = use.generation(plain, Offer(tools={"now": {}}))
    assert text_of(tokenizer, plain, tokens) == "sothenow{}"
    assert text_of(tokenizer, with_tools, tokens) == "[THINK]so[/THINK]the[TOOL_CALLS]now[ARGS]{}"
    assert text_of(tokenizer, use.generation(plain, Offer()), tokens) == "[THINK]so[/THINK]thenow{}"
    everything = use.generation(Generation(num_tokens=1, skip_special_tokens=False), Offer(tools={"now": {}}))
    assert text_of(tokenizer, everything, tokens) == text


def test_a_format_without_special_tokens_changes_nothing(tokenizer):
    tokenizer.chat_template = "<tool_call>"
    use = ToolUse(answer_formats(tokenizer, "auto", "auto"), tokenizer)
    plain = Generation(num_tokens=1)
    assert use.generation(plain, Offer(tools={"now": {}})) == plain
