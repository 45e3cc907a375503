"""Where the context ends and the query begins. The rules, first match:

1. `fields`: `contexts` beside the prompt, or `star.query_tokens`
2. `separator`: the last occurrence of `star.separator`, or else of the server's own
3. `last_message`: in a chat, the last user message with the generation prompt, if it is short enough
4. `last_tokens`: the last so many tokens (`--star-query-tokens`), which is also what "short enough" means
"""

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_star.server.errors import RequestError
from megatron_star.server.schemas import Message, StarOptions


class SplitPrompt(NamedTuple):
    """Token ids, and the rule that cut them."""

    context_tokens: list[int]
    query_tokens: list[int]
    rule: str


class PromptSplitter:
    """Applies the rules with one tokenizer. Special tokens in a text are recognised; none is added."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_query_tokens: int, separator: str | None
    ) -> None:
        self.tokenizer, self.num_query_tokens, self.separator = tokenizer, num_query_tokens, separator

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
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
        if options.query_tokens is not None:
            return self._split(text, options, None, "messages")
        if split := self._at_separator(text, options):
            return _with_a_query(split, "messages")
        return self._at_last_message(conversation, text)

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
        before = self._in_template(conversation[:-1], add_generation_prompt=False)
        if conversation[:-1] and text.startswith(before):
            edge = len(before)
        else:
            edge = max(0, text.rfind(conversation[-1]["content"]))
        context, query = self.encode(text[:edge]), self.encode(text[edge:])
        if len(query) <= self.num_query_tokens:
            return SplitPrompt(context, query, "last_message")
        return _last_tokens(context + query, self.num_query_tokens, "last_tokens")

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


def _last_tokens(tokens: list[int], count: int, rule: str) -> SplitPrompt:
    return SplitPrompt(tokens[:-count], tokens[-count:], rule)


def _with_a_query(split: SplitPrompt, field: str) -> SplitPrompt:
    if not split.query_tokens:
        raise RequestError(400, f"{field}: the query is empty: it needs at least one token", field)
    return split
