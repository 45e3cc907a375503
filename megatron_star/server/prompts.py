"""Where the context ends and the query begins. The rules, first match:

1. `fields`: `contexts` beside the prompt, or `star.query_tokens`
2. `separator`: the last occurrence of `star.separator`, or else of the server's own
3. `last_message`: in a chat, the last user message with the generation prompt, if it is short enough
4. `last_tokens`: the last so many tokens (`--star-query-tokens`), which is also what "short enough" means

A chat without a separator is cut turn by turn, so that what was encoded for an earlier turn is used again.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_star.server.errors import RequestError
from megatron_star.server.schemas import Message, StarOptions
from megatron_star.server.text_limit import TextLimit

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
        self.limit.check(text)
        return self.tokenizer.encode(text, add_special_tokens=False)

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
        text = self._in_template(conversation, add_generation_prompt=True)
        self.limit.check(text)
        if options.query_tokens is not None:
            return self._split(text, options, None, "messages")
        if split := self._at_separator(text, options):
            return _with_a_query(split, "messages")
        return _with_a_query(self._at_last_message(conversation, text), "messages")

    def _split(
        self, prompt: str | list[int], options: StarOptions, context: str | None, field: str
    ) -> SplitPrompt:
        if context is not None:
            query = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            return SplitPrompt(self.encode(context), query, "fields")
        if isinstance(prompt, str) and options.query_tokens is None:
            if split := self._at_separator(prompt, options):
                return split
        elif options.separator is not None:
            raise RequestError(400, "star.separator: it needs a prompt of text", "star.separator")
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        rule = "last_tokens" if options.query_tokens is None else "fields"
        return _last_tokens(tokens, options.query_tokens or self.num_query_tokens, rule)

    def _at_separator(self, text: str, options: StarOptions) -> SplitPrompt | None:
        separator = options.separator or self.separator
        if separator is None:
            return None
        context, found, query = text.rpartition(separator)
        if found:
            return SplitPrompt(self.encode(context), self.encode(query), "separator")
        if options.separator is not None:
            raise RequestError(400, "star.separator: the prompt does not contain it", "star.separator")
        return None

    def _at_last_message(self, conversation: list[dict[str, str]], text: str) -> SplitPrompt:
        """Each user message in its turn: what comes before it is that turn's context."""
        tokens: list[int] = []
        edges: list[int] = []
        end = 0
        for start, next_end in _user_messages(conversation, text):
            tokens += self.encode(text[end:start])
            query = self.encode(text[start:next_end])
            edges.append(len(tokens) + max(0, len(query) - self.num_query_tokens))
            tokens, end = tokens + query, next_end
        if not edges or end != len(text):  # the template changes what users write
            return _last_tokens(self.encode(text), self.num_query_tokens, "last_tokens")
        rule = "last_message" if len(query) <= self.num_query_tokens else "last_tokens"
        turn_edges = _edges_apart(edges, self.num_query_tokens)
        return SplitPrompt(tokens[: edges[-1]], tokens[edges[-1] :], rule, turn_edges)

    def _in_template(self, conversation: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise RequestError(400, "messages: the tokenizer of this model has no chat template", "messages")
        if not conversation:
            return ""
        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RequestError(
                400, f"messages: the chat template refuses them: {error}", "messages"
            ) from error


def _user_messages(conversation: list[dict[str, str]], text: str) -> Iterator[tuple[int, int]]:
    """Where in `text` the content of each user message starts, and where the generation prompt after it ends.

    A turn in which the template's words after a user message are not those after the last one is left out.
    """
    spans, position = [], 0
    for message in conversation:
        content = message["content"].strip()
        start = text.find(content, position)
        if start < 0:
            return
        position = start + len(content)
        if message["role"] == "user":
            spans.append((start, position))
    after_last = text[position:]
    for start, end in spans:
        if text.startswith(after_last, end):
            yield start, end + len(after_last)


def _edges_apart(edges: list[int], distance: int) -> tuple[int, ...]:
    """The edges before the last one, without those that would leave a part of fewer tokens."""
    kept = [0]
    for edge in edges[:-1]:
        if edge - kept[-1] >= distance:
            kept.append(edge)
    return tuple(kept[1 : 1 + MOST_TURN_EDGES])


def _last_tokens(tokens: list[int], count: int, rule: str) -> SplitPrompt:
    return SplitPrompt(tokens[:-count], tokens[-count:], rule)


def _with_a_query(split: SplitPrompt, field: str) -> SplitPrompt:
    if not split.query_tokens:
        raise RequestError(400, f"{field}: the query is empty: it needs at least one token", field)
    return split
