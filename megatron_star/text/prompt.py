"""From text to the tokens of a context and of a query: a text is tokenized as a whole, and then cut.

So the model sees the same tokens wherever the cut is, and no piece that a tokenizer would put in front of a
text of its own stands in the middle.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_star.text.chat_template import Chat, ChatTemplateError, render_chat
from megatron_star.text.chat_turns import Turn, turn_messages, turns
from megatron_star.text.text_limit import TextLimit

BLANK_LINE = "\n\n"
MOST_TURN_EDGES = 64
NEIGHBOURHOOD = 64
"""Characters before a place, on which it depends how a text is cut into tokens there."""


class SplitPrompt(NamedTuple):
    """Token ids of a context and of the query after it.

    Attributes:
        rule: what decided where the cut is: `last_tokens`, `last_message`, or whatever the caller says.
        turn_edges: where contexts of a chat's earlier turns ended (see `StarRequest`).
    """

    context_tokens: list[int]
    query_tokens: list[int]
    rule: str
    turn_edges: tuple[int, ...] = ()


class JoinedText(NamedTuple):
    """A context and a query as one text; the query begins at character `cut`."""

    text: str
    cut: int


def join(context: str, query: str) -> JoinedText:
    """Context and query, with a blank line between them where neither has white space there.

    Spaces between them belong to the query: in most vocabularies a space is one token with the word that
    follows, so that a context's tokens would depend on the question.
    """
    glued = context and query and not context[-1].isspace() and not query[0].isspace()
    return JoinedText(context + (BLANK_LINE if glued else "") + query, len(context.rstrip(" ")))


def truncated(split: SplitPrompt, num_tokens: int) -> SplitPrompt:
    """Its last so many tokens, at least one; those that are cut off are the context's first."""
    query = split.query_tokens[-num_tokens:]
    num_context = min(len(split.context_tokens), num_tokens - len(query))
    num_cut = len(split.context_tokens) - num_context
    edges = tuple(edge - num_cut for edge in split.turn_edges if edge > num_cut)
    return split._replace(context_tokens=split.context_tokens[num_cut:], query_tokens=query, turn_edges=edges)


def at_last_tokens(tokens: list[int], num_query_tokens: int, rule: str = "last_tokens") -> SplitPrompt:
    """The last so many tokens, at least one, are the query."""
    return SplitPrompt(tokens[:-num_query_tokens], tokens[-num_query_tokens:], rule)


def in_chat(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, index: int, joined: JoinedText
) -> JoinedText | None:
    """The chat with `joined` as the content of message `index`; None if its template changes that message.

    Raises:
        ChatTemplateError: as `render_chat`.
    """
    text, spans = render_chat(tokenizer, chat.with_content(index, joined.text), [index])
    return JoinedText(text, spans[0].position(joined.cut)) if spans else None


class PromptCutter:
    """Cuts texts with one tokenizer. Special tokens in a text are recognised; none is added."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: TextLimit | None = None) -> None:
        """limit: its ValueError is raised for a text that is too long, before that is tokenized."""
        self.tokenizer, self._limit = tokenizer, limit

    def tokens(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; with those that the tokenizer puts around one, if asked for."""
        if not add_special_tokens:
            return self._cut(text, [])[0]
        self._check(text)
        return self.tokenizer.encode(text, add_special_tokens=True)

    def at_query(self, joined: JoinedText, rule: str) -> SplitPrompt:
        """A text is cut where its query begins."""
        tokens, (cut,) = self._cut(joined.text, [joined.cut])
        return SplitPrompt(tokens[:cut], tokens[cut:], rule)

    def at_last_message(self, chat: Chat, num_query_tokens: int) -> SplitPrompt:
        """A chat is cut before its last message, or later if the query would have too many tokens.

        Where the last message is continued, it is the one before it. Each turn is cut so when it is the last:
        what comes before the cut is that turn's context.

        Raises:
            ChatTemplateError: as `render_chat`.
        """
        indices = turn_messages(chat)
        if not has_offsets(self.tokenizer):  # each cut takes a tokenization of its own
            indices = indices[-1:]
        text, spans = render_chat(self.tokenizer, chat, indices)
        if not spans:  # the template changes what is said
            return at_last_tokens(self.tokens(text), num_query_tokens)
        found = turns(self.tokenizer, chat, text, indices, spans)
        tokens, cuts = self._cut(text, [position for turn in found for position in turn[:3]])
        lengths = [
            self._length_then(text, turn, num) for turn, num in zip(found[:-1], cuts[1:-3:3], strict=True)
        ]
        edges = [
            max(start, min(end, length - num_query_tokens))
            for start, end, length in zip(cuts[::3], cuts[2::3], [*lengths, len(tokens)], strict=True)
        ]
        rule = "last_message" if len(tokens) - cuts[-3] <= num_query_tokens else "last_tokens"
        last = edges[-1]
        return SplitPrompt(tokens[:last], tokens[last:], rule, _edges_apart(edges, num_query_tokens))

    def _length_then(self, text: str, turn: Turn, num_tokens: int) -> int:
        """Tokens of the chat at the end of this turn, of which so many ended before its last words.

        Only a few characters are tokenized again: a token at the very end may be another one now.
        """
        before = text[max(0, turn.content_end - NEIGHBOURHOOD) : turn.content_end]
        tokens, (cut,) = tokenize_and_cut(self.tokenizer, before + turn.words, [len(before)])
        return num_tokens + len(tokens) - cut

    def _cut(self, text: str, positions: list[int]) -> tuple[list[int], list[int]]:
        self._check(text)
        return tokenize_and_cut(self.tokenizer, text, positions)

    def _check(self, text: str) -> None:
        if self._limit:
            self._limit.check(text)


def split_into_tokens(
    tokenizer: PreTrainedTokenizerBase, context: str, query: str, *, chat: bool, answer_prefix: str = ""
) -> tuple[list[int], list[int]]:
    """Context and query tokens, of both joined by `join`. Special tokens are recognised; none is added.

    With `chat`, context and query are one user message in the tokenizer's template, and the query's part
    begins where the query does: it takes the end of the template with it.

    Args:
        answer_prefix: how the answer begins; the end of the query's part.

    Raises:
        ValueError: the query is empty, or the tokenizer has no chat template or one that changes messages.
    """
    if not query.strip():
        raise ValueError("the query is empty: it needs at least one word")
    joined = _in_one_message(tokenizer, join(context, query.strip())) if chat else join(context, query)
    text = JoinedText(joined.text + answer_prefix, joined.cut)
    split = PromptCutter(tokenizer).at_query(text, "fields")
    return split.context_tokens, split.query_tokens


def _in_one_message(tokenizer: PreTrainedTokenizerBase, content: JoinedText) -> JoinedText:
    try:
        chat = in_chat(tokenizer, Chat([{"role": "user"}]), 0, content)
    except ChatTemplateError as error:
        raise ValueError(f"{error}: leave out --chat") from error
    if chat is None:
        raise ValueError("the chat template changes the query, so that its beginning cannot be found")
    return chat


def has_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """It tells which characters a token stands for."""
    return getattr(tokenizer, "is_fast", False)


def tokenize_and_cut(
    tokenizer: PreTrainedTokenizerBase, text: str, positions: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of the text, and for each of some rising positions how many of them end before it.

    Special tokens in the text are recognised, none is added. A token that a position falls into is after it.

    Args:
        positions: in characters.
    """
    if not has_offsets(tokenizer):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        heads = (tokenizer.encode(text[:position], add_special_tokens=False) for position in positions)
        return tokens, [_num_equal(tokens, head) for head in heads]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A piece that stands for no character ends at 0, or where it is.
    ends = list(accumulate((end for _, end in encoding["offset_mapping"]), max))
    return encoding["input_ids"], [bisect_right(ends, position) for position in positions]


def _edges_apart(edges: list[int], distance: int) -> tuple[int, ...]:
    """The edges before the last one, without those that would leave a part of fewer tokens."""
    kept = [0]
    for edge in edges[:-1]:
        if edge - kept[-1] >= distance and edge < edges[-1]:
            kept.append(edge)
    return tuple(kept[1 : 1 + MOST_TURN_EDGES])


def _num_equal(tokens: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False)))
