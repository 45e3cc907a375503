"""A conversation as the tokenizer's chat template writes it, and where in that text its messages are."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

PRIVATE_USE = range(0xE000, 0xF900)
_ERRORS_OF_TEMPLATES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplateError(ValueError):
    """There is no chat template, or it refuses the messages."""


class Span(NamedTuple):
    """Characters [start, end) of a text, which are a message's content without its first `num_cut`."""

    start: int
    end: int
    num_cut: int

    def position(self, index: int) -> int:
        """Where in the text the content's character `index` is."""
        return min(self.start + max(0, index - self.num_cut), self.end)


class RenderedChat(NamedTuple):
    """A text, and the spans of the messages that were asked for; None if the template changes them."""

    text: str
    spans: list[Span] | None


def render_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]], indices: Sequence[int]
) -> RenderedChat:
    """The conversation with a generation prompt, and the spans of the messages at these indices.

    To find them, the template writes the conversation once more with a mark in the place of each of them:
    what stands between the marks stands between the messages. Searching for their words would find those of
    the template, or of another message.

    Raises:
        ChatTemplateError: there is no chat template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError("the tokenizer of this model has no chat template")
    try:
        text = _render(tokenizer, conversation)
    except _ERRORS_OF_TEMPLATES as error:
        raise ChatTemplateError(f"the chat template refuses them: {error}") from error
    return RenderedChat(text, _spans(tokenizer, conversation, indices, text))


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[dict[str, str]],
    indices: Sequence[int],
    text: str,
) -> list[Span] | None:
    used = set(text)
    mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
    if mark is None:
        return None
    marked = list(conversation)
    for index in indices:
        marked[index] = marked[index] | {"content": f"{mark}{index}{mark}"}
    try:
        outline = _render(tokenizer, marked)
    except _ERRORS_OF_TEMPLATES:
        return None
    first, *rest = re.split(f"{mark}([0-9]+){mark}", outline)
    if [int(index) for index in rest[::2]] != list(indices) or not text.startswith(first):
        return None
    contents = [conversation[index]["content"] for index in indices]
    return _match(text, len(first), contents, rest[1::2])


def _match(text: str, position: int, contents: list[str], literals: list[str]) -> list[Span] | None:
    """Contents and what follows each, one after the other, from a position to the end of the text."""
    spans = []
    for content, literal in zip(contents, literals, strict=True):
        written = next(
            (
                form
                for form in (content, content.strip(), content.lstrip(), content.rstrip())
                if text.startswith(form, position) and text.startswith(literal, position + len(form))
            ),
            None,
        )
        if written is None:
            return None
        spans.append(Span(position, position + len(written), content.index(written)))
        position += len(written) + len(literal)
    return spans if position == len(text) else None


def _render(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
