"""From text to the tokens of a context and of a query."""

from transformers import PreTrainedTokenizerBase


def split_into_tokens(
    tokenizer: PreTrainedTokenizerBase, context: str, query: str, *, chat: bool
) -> tuple[list[int], list[int]]:
    """Context and query tokens. Special tokens in the text are recognised; none is added.

    With `chat`, context and query are one user message in the tokenizer's template, and the query's part
    begins where the query does: it takes the end of the template with it.

    Raises:
        ValueError: the query is empty, or the tokenizer has no chat template.
    """
    if not query.strip():
        raise ValueError("the query is empty: it needs at least one word")
    if chat:
        context, query = _in_chat_template(tokenizer, context, query)
    return _encode(tokenizer, context), _encode(tokenizer, query)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _in_chat_template(tokenizer: PreTrainedTokenizerBase, context: str, query: str) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise ValueError("the checkpoint's tokenizer has no chat template: leave out --chat")
    query = query.strip()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": context + query}], tokenize=False, add_generation_prompt=True
    )
    start = text.rfind(query)
    if start < 0:
        raise ValueError("the chat template changes the query, so that its beginning cannot be found")
    return text[:start], text[start:]
