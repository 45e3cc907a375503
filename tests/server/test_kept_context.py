"""A question after a kept context gives the tokens, and the cut, of sending the text and the question."""

import random

import pytest
from small_tokenizers import KINDS, TEMPLATES, small_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_star.config import FieldError
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.kept_context import LONGEST_CONVERSATION, KeptContext
from megatron_star.server.star_options import StarOptions
from megatron_star.text.chat_template import Chat
from megatron_star.text.prompt import in_chat, join

ENDS = [
    "so it is.",
    "ends in a word",
    "漢字。",
    "=" * 150,
    "a\n\n\nb",
    "</s>",
    "🦙",
    "Answer:",
    "«Grüße»",
    "x" * 99,
]
QUESTIONS = ["What changed?", "  and so on", "\n\n漢字?", "1 + 1", "=", "</s> two"]
SYSTEM = {"role": "system", "content": "Answer the user."}


def splitter_of(kind: str, template: str = "chatml", max_tokens: int = 1 << 16) -> PromptSplitter:
    return PromptSplitter(small_tokenizer(kind, template), 40, None, max_tokens=max_tokens)


def texts() -> list[str]:
    """That end in all kinds of ways; some longer than the tail that is looked at."""
    rng = random.Random(0)
    words = ["user", "and", "the", "question", "about", "Lisbon,", "Oslo:", "漢字", "🦚", "", "\n"]
    return [(" ".join(rng.choices(words, k=rng.choice([0, 3, 60]))) + end).strip() for end in ENDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_after_it_has_the_tokens_and_the_cut_of_sending_both(kind):
    splitter = splitter_of(kind)
    for text in texts():
        kept = KeptContext(f"\n {text} \n")
        ahead = kept.ahead(splitter)
        for question in QUESTIONS:
            sent = splitter.split(question.lstrip(), StarOptions(), context=text)
            found = kept.before_text(splitter, question, "prompt")
            assert (found.context_tokens, found.query_tokens) == (sent.context_tokens, sent.query_tokens), (
                text
            )
            assert found.context_tokens == ahead.context_tokens and ahead.query_tokens == []


def test_where_a_long_run_is_one_with_the_blank_line_after_it_enough_of_the_end_is_looked_at():
    """As Llama 3 and Qwen: punctuation, however much, and the ends of lines after it are one word."""
    tokenizer = Tokenizer(models.BPE())
    word = pre_tokenizers.Split(Regex(r"\p{L}+|[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [word, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["=" * n + "\n\nab" for n in range(1, 60)], trainer)
    splitter = PromptSplitter(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer), 40, None, max_tokens=1 << 14
    )
    for length in range(1, 150):
        kept = KeptContext("ab " * 9 + "=" * length)
        kept.ahead(splitter)
        sent = splitter.split("ab", StarOptions(), context=kept.text)
        found = kept.before_text(splitter, "ab", "prompt")
        assert (found.context_tokens, found.query_tokens) == (sent.context_tokens, sent.query_tokens), length


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "shouted"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_tokens_of_a_message_that_begins_with_the_text(kind, template):
    splitter = splitter_of(kind, template)
    for opening in ([], [SYSTEM]):
        for text in texts():
            kept = KeptContext(text, Chat(opening))
            ahead = kept.ahead(splitter).context_tokens
            for question in QUESTIONS[:3]:
                messages = [*opening, {"role": "user", "content": question}]
                joined = in_chat(
                    splitter.tokenizer, Chat(messages), len(opening), join(text, question.lstrip())
                )
                sent = splitter.cutter.at_query(joined, "sent")
                found = kept.in_chat(splitter, Chat(messages))
                assert (found.context_tokens, found.query_tokens) == (sent.context_tokens, sent.query_tokens)
                assert found.context_tokens == ahead


def test_what_follows_differently_than_was_foreseen_is_still_what_was_sent():
    splitter = splitter_of("byte_level")
    text, question = "the user and the assistant. " * 9 + "so it is", {"role": "user", "content": "What?"}
    for_chat, for_prompts = KeptContext(text, Chat([])), KeptContext(text)
    heads = {tuple(kept.ahead(splitter).context_tokens) for kept in (for_chat, for_prompts)}
    assert len(heads) == 2
    for messages in ([question], [SYSTEM, question]):
        of_both = [kept.in_chat(splitter, Chat(messages)) for kept in (for_chat, for_prompts)]
        assert of_both[0] == of_both[1]
        heads.add(tuple(of_both[0].context_tokens))
    assert len(heads) == 3
    assert for_chat.before_text(splitter, "What?", "") == for_prompts.before_text(splitter, "What?", "")


def test_a_conversation_is_read_after_the_context_and_a_long_one_is_encoded_turn_by_turn():
    splitter = splitter_of("byte_level")
    kept = KeptContext("the user and the assistant. " * 30, Chat([]))
    context = kept.ahead(splitter).context_tokens
    messages, lengths = [], []
    for turn in range(40):
        messages.append({"role": "user", "content": f"question {turn} about Lisbon and Oslo " * 2})
        found = kept.in_chat(splitter, Chat(messages))
        first = messages[0]["content"]
        whole = Chat(messages).with_content(0, join(kept.text, first).text)
        sent = splitter.split_chat(whole, StarOptions(query_tokens=1))
        assert found.context_tokens + found.query_tokens == sent.context_tokens + sent.query_tokens
        edges = (*found.turn_edges, len(found.context_tokens))
        assert edges[0] == len(context) and found.context_tokens[: len(context)] == context
        assert lengths == [] or edges[: len(lengths[-1]) - 1] == lengths[-1][:-1]
        lengths.append(edges)
        messages.append({"role": "assistant", "content": f"answer {turn}: " + "so it is, and so on. " * 3})
    assert len(lengths[5]) == 1 and len(lengths[-1]) > 3
    assert len(found.query_tokens) < 100 < LONGEST_CONVERSATION


def test_tokens_are_followed_by_tokens():
    splitter = splitter_of("byte_level")
    kept = KeptContext([5, 6, 7])
    assert kept.ahead(splitter).context_tokens == [5, 6, 7]
    assert kept.before_tokens([8], "prompt")[:2] == ([5, 6, 7], [8])
    for refused, field in (
        (lambda: kept.before_text(splitter, "What?", "prompt"), "prompt"),
        (lambda: kept.in_chat(splitter, Chat([SYSTEM])), "context_id"),
        (lambda: KeptContext("text").before_tokens([8], "prompt"), "prompt"),
        (lambda: KeptContext("text").before_text(splitter, " \n", "prompt"), "prompt"),
        (lambda: KeptContext("text").in_chat(splitter, Chat([SYSTEM])), "messages"),
        (lambda: KeptContext(" \n"), "text"),
        (lambda: KeptContext([1], Chat([])), "tokens"),
    ):
        with pytest.raises(FieldError) as error:
            refused()
        assert error.value.field == field


def test_a_template_that_changes_what_users_write_is_refused_by_name():
    kept = KeptContext("the user", Chat([]))
    with pytest.raises(FieldError, match="context_id: the chat template changes"):
        kept.ahead(splitter_of("byte_level", "shouted"))


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized():
    with pytest.raises(ValueError, match="more tokens than the model's limit, 100"):
        KeptContext("漢" * 10_000).ahead(splitter_of("byte_level", max_tokens=100))
