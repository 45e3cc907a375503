"""Where the context ends and the query begins. The rules, first match:

1. `fields`: `contexts` beside the prompt, or `star.query_tokens`
2. `separator`: the last occurrence of `star.separator`, or else of the server's own
3. `last_message`: in a chat, the last user message with the generation prompt, if it is short enough
4. `last_tokens`: the last so many tokens (`--star-query-tokens`), which is also what "short enough" means

The rules only say where the tokens of the whole text are cut. A chat without a separator is cut turn by turn,
so that what was encoded for an earlier turn is used again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_star.server.errors import RequestError
from megatron_star.server.schemas import Message
from megatron_star.server.star_options import StarOptions
from megatron_star.server.text_limit import TextLimit
from megatron_star.text.chat_template import RenderedChat, Span, render_chat
from megatron_star.text.prompt import has_offsets, join, tokenize_and_cut

MOST_TURN_EDGES = 64


class SplitPrompt(NamedTuple):
    """Token ids, the rule that cut them, and where contexts of earlier turns ended (see `StarRequest`)."""

    context_tokens: list[int]
    query_tokens: list[int]
    rule: str
    turn_edges: tuple[int, ...] = ()


class PromptSplitter:
    """Applies the rules with one tokenizer. Special tokens in a text are recognised; none is added."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int,
        separator: str | None,
        *,
        max_tokens: int,
    ) -> None:
        """max_tokens: that any request may have; a text that must have more is not tokenized at all."""
        self.tokenizer, self.num_query_tokens, self.separator = tokenizer, num_query_tokens, separator
        self.limit = TextLimit(tokenizer, max_tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises RequestError if it is too long for the model, whatever it says."""
        return self._cut(text, [])[0]

    def split(
        self,
        prompt: str | list[int],
        options: StarOptions,
        *,
        context: str | None = None,
        add_bos: bool = False,
        field: str = "prompt",
    ) -> SplitPrompt:
        """A prompt without chat. Raises RequestError, naming the field."""
        split = self._split(prompt, options, context, field)
        if add_bos:
            if self.tokenizer.bos_token_id is None:
                raise RequestError(400, "add_BOS: the tokenizer has no such token", "add_BOS")
            (split.context_tokens or split.query_tokens).insert(0, self.tokenizer.bos_token_id)
        return _with_a_query(split, field)

    def split_chat(self, messages: Sequence[Message], options: StarOptions) -> SplitPrompt:
        """Messages in the tokenizer's chat template. Raises RequestError, naming the field."""
        conversation = [message.for_template() for message in messages]
        if options.query_tokens is not None:
            split = self._last_tokens(self._render(conversation, []).text, options)
        else:
            split = self._chat_at_separator(conversation, options) or self._at_last_message(conversation)
        return _with_a_query(split, "messages")

    def _split(
        self, prompt: str | list[int], options: StarOptions, context: str | None, field: str
    ) -> SplitPrompt:
        if not isinstance(prompt, str):
            if options.separator is not None:
                raise RequestError(400, "star.separator: it needs a prompt of text", "star.separator")
            if context is not None:
                return SplitPrompt(self.encode(context), list(prompt), "fields")
            return self._last_tokens(prompt, options)
        if context is not None:
            return self._joined(context, prompt, "fields", field)
        if options.query_tokens is None and (separator := self._separator_in(prompt, options)):
            context, _, query = prompt.rpartition(separator)
            return self._joined(context, query, "separator", field)
        return self._last_tokens(prompt, options)

    def _joined(self, context: str, query: str, rule: str, field: str) -> SplitPrompt:
        _check_query(query, field)
        text, position = join(context, query)
        tokens, (cut,) = self._cut(text, [position])
        return SplitPrompt(tokens[:cut], tokens[cut:], rule)

    def _separator_in(self, text: str, options: StarOptions) -> str | None:
        """The separator that cuts this text, if one does."""
        separator = options.separator or self.separator
        if separator is not None and separator in text:
            return separator
        if options.separator is not None:
            raise RequestError(400, "star.separator: the prompt does not contain it", "star.separator")
        return None

    def _chat_at_separator(
        self, conversation: list[dict[str, str]], options: StarOptions
    ) -> SplitPrompt | None:
        """The last message with the separator is cut there; the separator is taken out."""
        contents = [message["content"] for message in conversation]
        separator = options.separator or self.separator
        index = next(
            (i for i in reversed(range(len(contents))) if separator and separator in contents[i]), -1
        )
        if not self._separator_in(contents[index], options):
            return None
        context, _, query = contents[index].rpartition(separator)
        if index == len(contents) - 1:
            _check_query(query, "messages")
        joined = join(context, query)
        conversation = list(conversation)
        conversation[index] = conversation[index] | {"content": joined.text}
        text, spans = self._render(conversation, [index])
        if spans is None:
            raise RequestError(
                400,
                "star.separator: the chat template changes the message that contains it",
                "star.separator",
            )
        tokens, (cut,) = self._cut(text, [spans[0].position(joined.cut)])
        return SplitPrompt(tokens[:cut], tokens[cut:], "separator")

    def _at_last_message(self, conversation: list[dict[str, str]]) -> SplitPrompt:
        """Each user message in its turn: what comes before it is that turn's context."""
        users = [index for index, message in enumerate(conversation) if message["role"] == "user"]
        if not has_offsets(self.tokenizer):  # each cut takes a tokenization of its own
            users = users[-1:]
        text, spans = self._render(conversation, users)
        if not spans:  # the template changes what users write
            return self._last_tokens(text, StarOptions())
        turns = _turns(text, spans)
        tokens, cuts = self._cut(text, [position for turn in turns for position in turn])
        most = self.num_query_tokens
        edges = [max(start, end - most) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
        rule = "last_message" if len(tokens) - cuts[-2] <= most else "last_tokens"
        return SplitPrompt(tokens[: edges[-1]], tokens[edges[-1] :], rule, _edges_apart(edges, most))

    def _last_tokens(self, prompt: str | list[int], options: StarOptions) -> SplitPrompt:
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        count = options.query_tokens or self.num_query_tokens
        rule = "last_tokens" if options.query_tokens is None else "fields"
        return SplitPrompt(tokens[:-count], tokens[-count:], rule)

    def _cut(self, text: str, positions: list[int]) -> tuple[list[int], list[int]]:
        self.limit.check(text)
        return tokenize_and_cut(self.tokenizer, text, positions)

    def _render(self, conversation: list[dict[str, str]], indices: list[int]) -> RenderedChat:
        try:
            return render_chat(self.tokenizer, conversation, indices)
        except ValueError as error:
            raise RequestError(400, f"messages: {error}", "messages") from error


def _turns(text: str, spans: list[Span]) -> list[tuple[int, int]]:
    """For each user message: where it starts, and where the generation prompt after it ends.

    A turn in which the template's words after a user message are not those after the last one is left out.
    """
    after_last = text[spans[-1].end :]
    return [
        (span.start, span.end + len(after_last)) for span in spans if text.startswith(after_last, span.end)
    ]


def _edges_apart(edges: list[int], distance: int) -> tuple[int, ...]:
    """The edges before the last one, without those that would leave a part of fewer tokens."""
    kept = [0]
    for edge in edges[:-1]:
        if edge - kept[-1] >= distance and edge < edges[-1]:
            kept.append(edge)
    return tuple(kept[1 : 1 + MOST_TURN_EDGES])


def _check_query(query: str, field: str) -> None:
    if not query:
        raise RequestError(400, f"{field}: the query is empty: it needs at least one token", field)


def _with_a_query(split: SplitPrompt, field: str) -> SplitPrompt:
    if not split.query_tokens:
        raise RequestError(400, f"{field}: the query is empty: it needs at least one token", field)
    return split
