"""A context that was sent once, and how a prompt or a conversation follows it.

An answer is the one that sending the text again, with a blank line after it, would give: the same tokens, and
the same cut between context and query. But neither is the text sent, nor is it tokenized, nor encoded: only
its end is tokenized together with what follows.

In a chat, the text is the beginning of the first message of the user. What the template writes before that
message is part of the context, since blocks of Star Attention depend on all that comes before them. So a
context is encoded ahead for chats that begin in one way (`opening`), or for completions.
"""

import sys
from array import array
from dataclasses import replace

from megatron_star.config import FieldError
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.text.chat_template import Chat, ChatTemplateError, render_chat
from megatron_star.text.prompt import BLANK_LINE, JoinedText, PromptCutter, SplitPrompt, join

RULE = "context_id"
ANY_QUERY = "A"
"""Stands for what will be asked: it begins with no white space, and no token reaches into it."""
TAIL_CHARACTERS = (64, 1024, 1 << 14)
"""Of a text's end, of which one is enough to know how it is cut into tokens there, in all but odd cases."""
LONGEST_CONVERSATION = 2048
"""Tokens of a conversation that are read anew for each answer; of a longer one, turns are encoded, too."""


class KeptContext:
    """A text, without white space at its ends, or tokens; immutable, but for what `ahead` notes.

    Attributes:
        text: None of a context of tokens.
        opening: of a chat, the messages before the text; None if it is encoded ahead for completions.
        tokens: of the context as it is encoded ahead; int32, with `head` before the text.
        head: what the template writes before the text.
    """

    def __init__(self, content: str | list[int], opening: Chat | None = None) -> None:
        """Raises FieldError, naming the field of a request."""
        self.text = content.strip() if isinstance(content, str) else None
        self.tokens = array("i", [] if isinstance(content, str) else content)
        self.opening, self.head, self._tail = opening, "", self.text or ""
        if self.text == "":
            raise FieldError("text: there is nothing but white space", "text")
        if opening and self.text is None:
            raise FieldError("tokens: a chat needs text: send text, or leave out messages", "tokens")

    @property
    def num_bytes(self) -> int:
        """Of memory, of the text and of its tokens."""
        return sys.getsizeof(self.text or "") + len(self.tokens) * self.tokens.itemsize

    def ahead(self, splitter: PromptSplitter) -> SplitPrompt:
        """The context alone, as others will follow it; called once, before any other method.

        Raises:
            ValueError: the text has more tokens than the model takes, or the template refuses the opening.
        """
        if self.text is not None:
            if self.opening:
                user = {"role": "user", "content": ANY_QUERY}
                chat = replace(self.opening, messages=[*self.opening.messages, user])
                self.head, _ = self._in_chat(splitter, chat)
            split = self._whole(splitter.cutter, self.head)
            self.tokens = array("i", split.context_tokens)
            self._tail = self._sufficient_tail(splitter.cutter, split)
        return SplitPrompt(self.tokens.tolist(), [], RULE)

    def before_text(self, splitter: PromptSplitter, query: str, field: str) -> SplitPrompt:
        """The context, and a text after it as the query. White space at its beginning is left out."""
        if self.text is None:
            raise FieldError(f"{field}: it follows a context of tokens: send tokens", field)
        if not (query := query.lstrip()):
            raise FieldError(f"{field}: the query is empty: it needs at least one word", field)
        asked = splitter.cutter.at_query(join(self._tail, query), RULE)
        return SplitPrompt(self._tokens_after(splitter, ""), asked.query_tokens, RULE)

    def before_tokens(self, query: list[int], field: str) -> SplitPrompt:
        """The context, and tokens after it as the query."""
        if self.text is not None:
            raise FieldError(f"{field}: it follows a context of text: send text", field)
        return SplitPrompt(self.tokens.tolist(), list(query), RULE)

    def in_chat(self, splitter: PromptSplitter, chat: Chat) -> SplitPrompt:
        """The context is the beginning of the first message of the user; what follows it is the query.

        Of a long conversation, turns up to the last one are part of the context, after what is kept.
        """
        if self.text is None:
            raise FieldError("context_id: it is a context of tokens: a chat needs text", "context_id")
        head, rest = self._in_chat(splitter, chat)
        context = self._tokens_after(splitter, head)
        query = splitter.cutter.at_query(rest, RULE).query_tokens
        if len(query) <= max(LONGEST_CONVERSATION, splitter.num_query_tokens):
            return SplitPrompt(context, query, RULE)
        index = _first_of_user(chat)
        whole = chat.with_content(index, join(self.text, chat.messages[index]["content"].lstrip()).text)
        split, num_kept = splitter.cutter.at_last_message(whole, splitter.num_query_tokens), len(context)
        later = [edge for edge in split.turn_edges if edge >= num_kept + splitter.num_query_tokens]
        if len(split.context_tokens) < num_kept + splitter.num_query_tokens:
            return SplitPrompt(context, query, RULE)
        return split._replace(rule=RULE, turn_edges=(num_kept, *later))

    def _in_chat(self, splitter: PromptSplitter, chat: Chat) -> tuple[str, JoinedText]:
        """What the template writes before the text, and its tail with all that follows it."""
        index = _first_of_user(chat)
        joined = join(self._tail, chat.messages[index]["content"].lstrip())
        try:
            text, spans = render_chat(splitter.tokenizer, chat.with_content(index, joined.text), [index])
        except ChatTemplateError as error:
            raise FieldError(f"messages: {error}", "messages") from error
        if not spans or not text.startswith(self._tail, spans[0].start):
            raise FieldError("context_id: the chat template changes what users write", "context_id")
        start = spans[0].start
        return text[:start], JoinedText(text[start:], joined.cut)

    def _tokens_after(self, splitter: PromptSplitter, head: str) -> list[int]:
        """Of the context in a chat that begins so; those that are there, or they are found anew."""
        if head == self.head:
            return self.tokens.tolist()
        return self._whole(splitter.cutter, head).context_tokens

    def _whole(self, cutter: PromptCutter, head: str) -> SplitPrompt:
        before = head + self.text
        return cutter.at_query(JoinedText(before + BLANK_LINE + ANY_QUERY, len(before)), RULE)

    def _sufficient_tail(self, cutter: PromptCutter, whole: SplitPrompt) -> str:
        """So much of the text's end that it alone is cut into the same tokens there."""
        for size in TAIL_CHARACTERS:
            tail = self.text[-size:].lstrip()
            split = cutter.at_query(join(tail, ANY_QUERY), RULE)
            num_compared = min(8, len(split.context_tokens) // 2)
            last = slice(-num_compared, None) if num_compared else slice(0)
            same = split.context_tokens[last] == whole.context_tokens[last]
            if same and split.query_tokens == whole.query_tokens:
                return tail
        return self.text


def _first_of_user(chat: Chat) -> int:
    index = next((i for i, message in enumerate(chat.messages) if message["role"] == "user"), None)
    if index is None:
        raise FieldError("messages: the context needs a message of the user to stand in", "messages")
    return index
