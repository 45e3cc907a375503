"""The turns of a chat: each ended with what came before an answer when that answer was asked for.

An agent's turns end with a tool's result as often as with words of a user.
"""

from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_star.text.chat_template import Chat, ChatTemplateError, Span, render_chat

ASSISTANT = "assistant"


class Turn(NamedTuple):
    """A message that ended a turn: its content is characters [start, content_end) of the chat's text.

    Attributes:
        end: up to it the text is as it was at the end of that turn.
        words: what the template wrote after the content at the end of that turn.
    """

    start: int
    content_end: int
    end: int
    words: str


def turn_messages(chat: Chat) -> list[int]:
    """The last message, and those before one of the assistant, by their indices."""
    roles = [message["role"] for message in chat.messages]
    last = [] if chat.continue_final_message else [len(roles) - 1]
    before = [
        index
        for index in range(len(roles) - 1)
        if roles[index] != ASSISTANT and roles[index + 1] == ASSISTANT
    ]
    return before + last


def turns(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, indices: Sequence[int], spans: Sequence[Span]
) -> list[Turn]:
    """The turns that end with these messages, which have these spans in the text.

    A turn whose words are not known is left out.
    """
    words_of: dict[str, str | None] = {}
    found = []
    for index, span in zip(indices[:-1], spans[:-1], strict=True):
        role = chat.messages[index]["role"]
        if role not in words_of:
            words_of[role] = _words_after(tokenizer, chat, index)
        words = words_of[role]
        if words is not None:
            there = commonprefix([words, text[span.end : span.end + len(words)]])
            found.append(Turn(span.start, span.end, span.end + len(there), words))
    last = spans[-1]
    return [*found, Turn(last.start, last.end, len(text), text[last.end :])]


def _words_after(tokenizer: PreTrainedTokenizerBase, chat: Chat, index: int) -> str | None:
    """What the template wrote after this message when it was the last."""
    then = replace(
        chat,
        messages=chat.messages[: index + 1],
        add_generation_prompt=True,
        continue_final_message=False,
    )
    try:
        text, spans = render_chat(tokenizer, then, [index])
    except ChatTemplateError:
        return None
    return text[spans[0].end :] if spans else None
