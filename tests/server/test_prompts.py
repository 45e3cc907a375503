"""Where a chat's context ends, and that a later turn finds what an earlier one encoded."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from megatron_star.server.errors import RequestError
from megatron_star.server.prompts import MOST_TURN_EDGES, PromptSplitter
from megatron_star.server.schemas import Message, StarOptions

NUM_QUERY_TOKENS = 40
DOCUMENT = "Anna lives in Lisbon. Karl lives in Oslo. " * 20


@pytest.fixture(scope="module")
def splitter(smollm2):
    return PromptSplitter(AutoTokenizer.from_pretrained(smollm2[0]), NUM_QUERY_TOKENS, None, max_tokens=8192)


def conversation(*contents: str) -> list[Message]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [Message(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


def split(splitter, *contents: str):
    return splitter.split_chat(conversation(*contents), StarOptions())


def test_the_query_is_the_last_user_message_with_the_generation_prompt(splitter):
    found = split(splitter, "Hello", "Hello!", "What is new?")
    assert found.rule == "last_message"
    assert splitter.tokenizer.decode(found.query_tokens) == "What is new?<|im_end|>\n<|im_start|>assistant\n"


def test_all_tokens_of_the_conversation_are_there(splitter):
    contents = ["Hello", "Hello!", "  What is new? ", "Nothing.", "user"]
    found = split(splitter, *contents)
    text = splitter.tokenizer.apply_chat_template(
        [message.for_template() for message in conversation(*contents)],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert splitter.tokenizer.decode(found.context_tokens + found.query_tokens) == text


@pytest.mark.parametrize("first", [DOCUMENT + "Where is Anna?", "Hello"], ids=["document", "short"])
def test_each_turns_context_continues_the_one_before_it(splitter, first):
    contents = [first]
    earlier: list = []
    for turn in range(6):
        found = split(splitter, *contents)
        edges = (*found.turn_edges, len(found.context_tokens))
        for before in earlier:
            assert found.context_tokens[: len(before.context_tokens)] == before.context_tokens
        # One of an earlier turn's contexts is extended as it was, but for fewer tokens than a query may have.
        if earlier and len(earlier[-1].context_tokens) >= NUM_QUERY_TOKENS:
            known = {(*e.turn_edges, len(e.context_tokens)) for e in earlier}
            reused = max(edges.index(k[-1]) + 1 for k in known if edges[: len(k)] == k)
            assert len(earlier[-1].context_tokens) - edges[reused - 1] < NUM_QUERY_TOKENS
        earlier.append(found)
        contents += [f"Answer {turn}: " + "so it is, and so on. " * turn, f"And what about number {turn}?"]


def test_a_long_conversation_has_a_bounded_number_of_edges(splitter):
    large = PromptSplitter(splitter.tokenizer, NUM_QUERY_TOKENS, None, max_tokens=1 << 15)
    found = split(large, *["one two three four five six seven eight nine ten " * 8] * 201)
    assert len(found.turn_edges) == MOST_TURN_EDGES


def test_a_template_that_changes_what_users_write_falls_back_to_the_last_tokens():
    shouting = SimpleNamespace(
        chat_template="yes",
        apply_chat_template=lambda messages, **_: " ".join(m["content"].upper() for m in messages),
        encode=lambda text, **_: list(text.encode()),
        get_vocab=lambda: {"a": 0},
    )
    found = split(PromptSplitter(shouting, 5, None, max_tokens=100), "hello", "a", "world")
    assert (bytes(found.query_tokens), found.rule, found.turn_edges) == (b"WORLD", "last_tokens", ())


def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(splitter):
    with pytest.raises(
        RequestError, match="10000000 characters has more tokens than the model's limit, 8192"
    ):
        splitter.encode("a" * 10_000_000)


def test_a_text_of_the_longest_tokens_is_not_refused(splitter):
    longest = max(splitter.tokenizer.get_vocab(), key=len)
    text = splitter.tokenizer.convert_tokens_to_string([longest]) * 8192
    assert splitter.tokenizer.decode(splitter.encode(text)) == text
