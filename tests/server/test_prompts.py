"""Where a chat's context ends, and that a later turn finds what an earlier one encoded."""

import itertools
import random

import pytest
from small_tokenizers import KINDS, TEMPLATES, small_tokenizer
from transformers import AutoTokenizer

from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.message_schema import Message
from megatron_star.text.chat_template import Chat
from megatron_star.text.prompt import MOST_TURN_EDGES, split_into_tokens

NUM_QUERY_TOKENS = 40
DOCUMENT = "Anna lives in Lisbon. Karl lives in Oslo. " * 20


@pytest.fixture(scope="module")
def splitter(smollm2):
    return PromptSplitter(AutoTokenizer.from_pretrained(smollm2[0]), NUM_QUERY_TOKENS, None, max_tokens=8192)


def conversation(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def split(splitter, *contents: str):
    return splitter.split_chat(Chat(conversation(*contents)), StarOptions())


def test_the_query_is_the_last_user_message_with_the_generation_prompt(splitter):
    found = split(splitter, "Hello", "Hello!", "What is new?")
    assert found.rule == "last_message"
    assert splitter.tokenizer.decode(found.query_tokens) == "What is new?<|im_end|>\n<|im_start|>assistant\n"


def test_all_tokens_of_the_conversation_are_there(splitter):
    contents = ["Hello", "Hello!", "  What is new? ", "Nothing.", "user"]
    found = split(splitter, *contents)
    text = splitter.tokenizer.apply_chat_template(
        conversation(*contents),
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
    splitter = PromptSplitter(small_tokenizer("byte_level", "shouted"), 5, None, max_tokens=100)
    found = split(splitter, "hello", "a", "world")
    assert splitter.tokenizer.decode(found.query_tokens) == "WORLD"
    assert (found.rule, found.turn_edges) == ("last_tokens", ())


FRAGMENTS = ["a", "assistant", "user", "s", " ", "\n", "  Hi", ".", "What changed?", "🦙", "🦚\n"]
FRAGMENTS += ["[INST]", "<|im_end|>", "1", "", "Lisbon ", "\ue000", "one two three " * 8]


def random_text(generator: random.Random) -> str:
    return "".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 5)))


def tokens_of_the_whole(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.fixture(scope="module", params=["smollm2", *itertools.product(KINDS, TEMPLATES)], ids=str)
def any_tokenizer(request, smollm2):
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(smollm2[0])
    return small_tokenizer(*request.param)


def test_a_chats_tokens_are_those_of_its_template_as_a_whole_whatever_is_said(any_tokenizer):
    generator = random.Random(0)
    splitter = PromptSplitter(any_tokenizer, 12, None, max_tokens=8192)
    for _ in range(60):
        messages = conversation(*(random_text(generator) for _ in range(generator.choice([1, 3, 5]))))
        expected = tokens_of_the_whole(any_tokenizer, messages)
        if expected:
            found = splitter.split_chat(Chat(messages), StarOptions())
            assert found.context_tokens + found.query_tokens == expected


@pytest.mark.parametrize("template", ["chatml", "llama2", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query", ["a", "assistant", "s", "user", "IN", ":", "What changed?", "🦚"])
def test_the_query_is_the_whole_last_message_however_short(kind, template, query):
    tokenizer = small_tokenizer(kind, template)
    splitter = PromptSplitter(tokenizer, NUM_QUERY_TOKENS, None, max_tokens=8192)
    with_query = split(splitter, "a user", "assistant", query)
    with_another = split(splitter, "a user", "assistant", "Where?")

    assert with_query.rule == "last_message"
    assert tokenizer.decode(with_query.query_tokens).lstrip().startswith(query)
    # The context is what comes before the message: the same, whatever the message says.
    shorter = len(with_query.context_tokens) - len(with_another.context_tokens)
    assert abs(shorter) <= 1
    assert all(map(int.__eq__, with_query.context_tokens, with_another.context_tokens))


@pytest.mark.parametrize("document", ["Lisbon and Oslo. ", "Lisbon and Oslo.\n", "Lisbon and Oslo. \n  "])
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_before_a_separator_has_the_same_tokens_for_every_question(kind, document):
    tokenizer = small_tokenizer(kind)
    splitter = PromptSplitter(tokenizer, NUM_QUERY_TOKENS, "###", max_tokens=8192)
    contexts = set()
    for question in ("What changed?", "1?", "🦙", "a"):
        messages = conversation(f"{document}###{question}")
        found = splitter.split_chat(Chat(messages), StarOptions())
        whole = tokens_of_the_whole(tokenizer, conversation(document + question))
        assert (found.rule, found.context_tokens + found.query_tokens) == ("separator", whole)
        contexts.add(tuple(found.context_tokens))
    assert len(contexts) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("context", "query"), [("The end.", "What changed?"), ("The end. ", "a"), ("", "a")])
def test_nothing_is_glued_and_no_piece_is_put_between(kind, context, query):
    tokenizer = small_tokenizer(kind)
    splitter = PromptSplitter(tokenizer, NUM_QUERY_TOKENS, None, max_tokens=8192)
    text = "The end.\n\nWhat changed?" if query == "What changed?" else context + query
    whole = tokenizer.encode(text, add_special_tokens=False)
    in_chat = tokens_of_the_whole(tokenizer, conversation(text))

    by_fields = splitter.split(query, StarOptions(), context=context)
    by_separator = splitter.split(f"{context}##{query}", StarOptions(separator="##"))
    in_a_chat = splitter.split_chat(Chat(conversation(f"{context}##{query}")), StarOptions(separator="##"))
    for found, expected in ((by_fields, whole), (by_separator, whole), (in_a_chat, in_chat)):
        assert found.context_tokens + found.query_tokens == expected
    for chat, expected in ((False, whole), (True, in_chat)):
        parts = split_into_tokens(tokenizer, context, query, chat=chat)
        assert parts[0] + parts[1] == expected and parts[1]


def test_parts_of_a_message_are_lines():
    message = Message(role="user", content=[{"type": "text", "text": part} for part in ("one", "two")])
    assert message.for_template()["content"] == "one\ntwo"


def test_the_answers_beginning_continues_the_query():
    tokenizer = small_tokenizer("metaspace")
    context, query = split_into_tokens(tokenizer, "The end.\n", "What?", chat=True, answer_prefix="It is")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The end.\nWhat?"}], tokenize=False, add_generation_prompt=True
    )
    assert context + query == tokenizer.encode(text + "It is", add_special_tokens=False)


def test_a_tokenizer_without_offsets_is_cut_as_one_with_them():
    class WithoutOffsets:
        is_fast = False

        def __getattr__(self, name):
            return getattr(small_tokenizer("byte_level"), name)

    contents = ["Lisbon", "assistant", "What changed? 🦙"]
    found = [
        split(PromptSplitter(tokenizer, NUM_QUERY_TOKENS, None, max_tokens=8192), *contents)
        for tokenizer in (small_tokenizer("byte_level"), WithoutOffsets())
    ]
    assert found[0] == found[1]


def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(splitter):
    with pytest.raises(ValueError, match="10000000 characters has more tokens than the model's limit, 8192"):
        splitter.split("a" * 10_000_000, StarOptions())


def test_a_text_of_the_longest_tokens_is_not_refused(splitter):
    longest = max(splitter.tokenizer.get_vocab(), key=len)
    text = splitter.tokenizer.convert_tokens_to_string([longest]) * 8192
    found = splitter.split(text, StarOptions())
    assert splitter.tokenizer.decode(found.context_tokens + found.query_tokens) == text
