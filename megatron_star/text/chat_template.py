"""A conversation as a chat template writes it, and where in that text its messages are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

PRIVATE_USE = range(0xE000, 0xF900)
_ERRORS_OF_TEMPLATES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
Message = dict[str, Any]


class ChatTemplateError(ValueError):
    """There is no chat template, or it refuses the messages."""


class Template(Protocol):
    """One that is not the tokenizer's own."""

    text: str

    def render(self, chat: "Chat", special_tokens: dict[str, Any]) -> str:
        """What it writes. Raises what templates raise."""


@dataclass(frozen=True)
class Chat:
    """What a chat template writes as one text.

    Attributes:
        messages: `role` and `content`, a text, and what else a message has by the names that OpenAI and
            chat templates know: `name`, `tool_calls`, `tool_call_id`, `reasoning_content`. Arguments of
            tool calls are JSON texts.
        tools, documents: as chat templates know them.
        variables: further names that the template may ask for.
        template: in place of the tokenizer's own.
        add_generation_prompt: the text ends with what comes before an answer.
        continue_final_message: it ends with the last message, which the answer continues.
    """

    messages: Sequence[Message]
    _: KW_ONLY
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, str]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    template: Template | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def with_content(self, index: int, content: str) -> "Chat":
        """The same, but for what message `index` says."""
        messages = list(self.messages)
        messages[index] = messages[index] | {"content": content}
        return replace(self, messages=messages)


class Span(NamedTuple):
    """Characters [start, end) of a text, which are a message's content without its first `num_cut`.

    Attributes:
        json_of: the content, if the text has it as a JSON text would.
    """

    start: int
    end: int
    num_cut: int
    json_of: str | None = None

    def position(self, index: int) -> int:
        """Where in the text the content's character `index` is."""
        if self.json_of is not None:
            return self.start + len(_in_json(self.json_of[:index]))
        return min(self.start + max(0, index - self.num_cut), self.end)


class RenderedChat(NamedTuple):
    """A text, and the spans of the messages that were asked for; None if the template changes them."""

    text: str
    spans: list[Span] | None


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, indices: Sequence[int]) -> RenderedChat:
    """The text of a chat, and the spans of the messages at these indices.

    To find them, the template writes the conversation once more with a mark in the place of each of them:
    what stands between the marks stands between the messages. Searching for their words would find those of
    the template, or of another message.

    Raises:
        ChatTemplateError: there is no chat template, or it refuses these messages.
    """
    if "developer" not in template_of(
        tokenizer, chat
    ):  # most templates know one role for whoever gives the model its orders
        chat = replace(chat, messages=[_as_system(message) for message in chat.messages])
    text, chat = _rendered(tokenizer, chat)
    return RenderedChat(text, _spans(tokenizer, chat, indices, text) if indices else [])


def template_of(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """The template that writes this chat. Raises ChatTemplateError if there is none."""
    if chat.template:
        return chat.template.text
    if not tokenizer.chat_template:
        raise ChatTemplateError("the tokenizer of this model has no chat template")
    try:
        return tokenizer.get_chat_template(tools=chat.tools)
    except ValueError as error:
        raise ChatTemplateError(
            "the tokenizer of this model has several chat templates, none named default"
        ) from error


def check_template(template: str) -> None:
    """Raises ValueError, naming the line, if this is no chat template."""
    try:
        render_jinja_template(conversations=[[]], chat_template=template)
    except TemplateSyntaxError as error:
        raise ValueError(f"it is no chat template: line {error.lineno}: {error.message}") from error
    except _ERRORS_OF_TEMPLATES:  # it misses messages, or what a tokenizer tells it
        pass


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if message["role"] == "developer" else message


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, Chat]:
    """The text, and the chat as the template takes it: most read arguments of tool calls as objects."""
    with_objects = replace(chat, messages=[_with_objects(message) for message in chat.messages])
    try:
        try:
            return _render(tokenizer, with_objects), with_objects
        except TypeError:  # it joins texts
            return _render(tokenizer, chat), chat
    except ChatTemplateError:
        raise
    except _ERRORS_OF_TEMPLATES as error:
        raise ChatTemplateError(f"the chat template refuses them: {error}") from error


def _with_objects(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return message | {"tool_calls": [call | {"function": _with_object(call["function"])} for call in calls]}


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are no JSON object stay as the model wrote them."""
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return function
    return function | {"arguments": arguments} if isinstance(arguments, dict) else function


def _spans(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, indices: Sequence[int], text: str
) -> list[Span] | None:
    used = set(text)
    mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
    if mark is None:
        return None
    marked = list(chat.messages)
    for index in indices:
        marked[index] = marked[index] | {"content": f"{mark}{index}{mark}"}
    try:
        outline = _render(tokenizer, replace(chat, messages=marked))
    except _ERRORS_OF_TEMPLATES:
        return None
    first, *rest = re.split(f"{mark}([0-9]+){mark}", outline)
    if [int(index) for index in rest[::2]] != list(indices) or not text.startswith(first):
        return None
    contents = [chat.messages[index]["content"] for index in indices]
    return _match(text, len(first), contents, rest[1::2])


def _match(text: str, position: int, contents: list[str], literals: list[str]) -> list[Span] | None:
    """Contents and what follows each, one after the other, from a position to the end of the text."""
    spans = []
    for content, literal in zip(contents, literals, strict=True):
        written = next(
            (
                form
                for form in (content, content.strip(), content.lstrip(), content.rstrip(), _in_json(content))
                if text.startswith(form, position) and text.startswith(literal, position + len(form))
            ),
            None,
        )
        if written is None:
            return None
        end = position + len(written)
        cut = content.find(written)
        spans.append(Span(position, end, cut) if cut >= 0 else Span(position, end, 0, content))
        position = end + len(literal)
    return spans if position == len(text) else None


def _in_json(content: str) -> str:
    """As templates write it that put a tool's result into an object."""
    return json.dumps(content, ensure_ascii=False)[1:-1]


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    if chat.template:
        return chat.template.render(chat, tokenizer.special_tokens_map)
    return tokenizer.apply_chat_template(
        list(chat.messages),
        tools=chat.tools,
        documents=chat.documents,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        tokenize=False,
        **chat.variables,
    )
