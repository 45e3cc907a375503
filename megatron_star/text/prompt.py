"""From text to the tokens of a context and of a query: a text is tokenized as a whole, and then cut.

So the model sees the same tokens wherever the cut is, and no piece that a tokenizer would put in front of a
text of its own stands in the middle.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_star.text.chat_template import render_chat

BLANK_LINE = "\n\n"


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
    joined = _in_chat_template(tokenizer, join(context, query.strip())) if chat else join(context, query)
    tokens, (cut,) = tokenize_and_cut(tokenizer, joined.text + answer_prefix, [joined.cut])
    return tokens[:cut], tokens[cut:]


def _in_chat_template(tokenizer: PreTrainedTokenizerBase, message: JoinedText) -> JoinedText:
    try:
        text, spans = render_chat(tokenizer, [{"role": "user", "content": message.text}], [0])
    except ValueError as error:
        raise ValueError(f"{error}: leave out --chat") from error
    if spans is None:
        raise ValueError("the chat template changes the query, so that its beginning cannot be found")
    return JoinedText(text, spans[0].position(message.cut))


def _num_equal(tokens: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False)))
