"""Where the context ends and the query begins. The rules, first match:

1. `fields`: `contexts` beside the prompt, or `star.query_tokens`
2. `separator`: the last occurrence of `star.separator`, or else of the server's own
3. `last_message`: in a chat, the last message with the generation prompt, if it is short enough; where the
   answer continues that message, the one before it, too
4. `last_tokens`: the last so many tokens (`--star-query-tokens`), which is also what "short enough" means

The rules only say where the tokens of the whole text are cut; `text/prompt.py` cuts them. A chat without a
separator is cut turn by turn, so that what was encoded for an earlier turn is used again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from megatron_star.config import FieldError
from megatron_star.server.star_options import StarOptions
from megatron_star.text.chat_template import Chat, ChatTemplateError, render_chat, template_of
from megatron_star.text.prompt import PromptCutter, SplitPrompt, at_last_tokens, in_chat, join
from megatron_star.text.text_limit import TextLimit

NO_PLACE_FOR_DOCUMENTS = "documents: the chat template has no place for them: put them into a message"


class PromptSplitter:
    """Applies the rules with one tokenizer.

    Its methods raise ValueError for what they refuse: a FieldError, where it is one field's fault.
    """

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
        self._cutter = PromptCutter(tokenizer, TextLimit(tokenizer, max_tokens))

    @property
    def cutter(self) -> PromptCutter:
        """For texts that are cut where somebody else says."""
        return self._cutter

    def split(
        self,
        prompt: str | list[int],
        options: StarOptions,
        *,
        context: str | None = None,
        add_bos: bool = False,
        field: str = "prompt",
    ) -> SplitPrompt:
        """A prompt without chat, which stands in this field."""
        if isinstance(prompt, str):
            split = self._split_text(prompt, options, context, field)
        else:
            split = self._split_tokens(prompt, options, context)
        if add_bos:
            if self.tokenizer.bos_token_id is None:
                raise FieldError("add_BOS: the tokenizer has no such token", "add_BOS")
            (split.context_tokens or split.query_tokens).insert(0, self.tokenizer.bos_token_id)
        _check_query(split.query_tokens, field)
        return split

    def split_chat(self, chat: Chat, options: StarOptions) -> SplitPrompt:
        """Messages in the tokenizer's chat template."""
        with self._refused_messages(chat):
            split = self._split_chat(chat, options)
        _check_query(split.query_tokens, "messages")
        return split

    def chat_text(self, chat: Chat) -> str:
        """What the chat template writes."""
        with self._refused_messages(chat):
            return render_chat(self.tokenizer, chat, []).text

    def tokens(self, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
        """Of a text, in this field, with or without those that the tokenizer puts around it."""
        try:
            return self._cutter.tokens(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise FieldError(f"{field}: {error}", field) from error

    @contextmanager
    def _refused_messages(self, chat: Chat) -> Iterator[None]:
        try:
            if chat.documents and "documents" not in template_of(self.tokenizer, chat):
                raise FieldError(NO_PLACE_FOR_DOCUMENTS, "documents")
            yield
        except ChatTemplateError as error:
            raise FieldError(f"messages: {error}", "messages") from error

    def _split_text(self, prompt: str, options: StarOptions, context: str | None, field: str) -> SplitPrompt:
        if context is not None:
            return self._at_query(context, prompt, "fields", field)
        if options.query_tokens is None and (separator := self._separator_in(prompt, options)):
            context, _, query = prompt.rpartition(separator)
            return self._at_query(context, query, "separator", field)
        return self._at_last_tokens(self._cutter.tokens(prompt), options)

    def _split_tokens(self, prompt: list[int], options: StarOptions, context: str | None) -> SplitPrompt:
        if options.separator is not None:
            raise FieldError("star.separator: it needs a prompt of text", "star.separator")
        if context is not None:
            return SplitPrompt(self._cutter.tokens(context), list(prompt), "fields")
        return self._at_last_tokens(prompt, options)

    def _split_chat(self, chat: Chat, options: StarOptions) -> SplitPrompt:
        if options.query_tokens is not None:
            text = render_chat(self.tokenizer, chat, []).text
            return self._at_last_tokens(self._cutter.tokens(text), options)
        at_separator = self._chat_at_separator(chat, options)
        return at_separator or self._cutter.at_last_message(chat, self.num_query_tokens)

    def _chat_at_separator(self, chat: Chat, options: StarOptions) -> SplitPrompt | None:
        """The last message with the separator is cut there; the separator is taken out."""
        contents = [message["content"] for message in chat.messages]
        separator = options.separator or self.separator
        index = next(
            (i for i in reversed(range(len(contents))) if separator and separator in contents[i]), -1
        )
        if not self._separator_in(contents[index], options):
            return None
        context, _, query = contents[index].rpartition(separator)
        if index == len(contents) - 1:
            _check_query(query, "messages")
        joined = in_chat(self.tokenizer, chat, index, join(context, query))
        if joined is None:
            raise FieldError(
                "star.separator: the chat template changes the message that contains it", "star.separator"
            )
        return self._cutter.at_query(joined, "separator")

    def _separator_in(self, text: str, options: StarOptions) -> str | None:
        """The separator that cuts this text, if one does."""
        separator = options.separator or self.separator
        if separator is not None and separator in text:
            return separator
        if options.separator is not None:
            raise FieldError("star.separator: the prompt does not contain it", "star.separator")
        return None

    def _at_query(self, context: str, query: str, rule: str, field: str) -> SplitPrompt:
        _check_query(query, field)
        return self._cutter.at_query(join(context, query), rule)

    def _at_last_tokens(self, tokens: list[int], options: StarOptions) -> SplitPrompt:
        if options.query_tokens is None:
            return at_last_tokens(tokens, self.num_query_tokens)
        return at_last_tokens(tokens, options.query_tokens, "fields")


def _check_query(query: str | list[int], field: str) -> None:
    if not query:
        raise FieldError(f"{field}: the query is empty: it needs at least one token", field)
