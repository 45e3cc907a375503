"""Answers are split into reasoning, calls and content, wherever their text is cut."""

import random
from collections.abc import Iterable

import pytest
from answer_texts import TEXTS, TOOLS, Meaning

from megatron_star.server.tools.answer_parser import AnswerFormats
from megatron_star.server.tools.deltas import Arguments, Call, Content, Delta, Reasoning
from megatron_star.server.tools.formats import CALL_FORMATS, CALL_NAMES, REASONING_FORMATS

CASES = [
    pytest.param(name, text, meaning, id=f"{name}-{index}")
    for name, texts in TEXTS.items()
    for index, (text, meaning) in enumerate(texts)
]
THINK, ALWAYS, MISTRAL = REASONING_FORMATS


def formats(name: str) -> AnswerFormats:
    return AnswerFormats(next(known for known in CALL_FORMATS if name in known.names))


def meaning(deltas: Iterable[Delta]) -> Meaning:
    """What they say together."""
    texts, calls = {Content: "", Reasoning: ""}, []
    for delta in deltas:
        if isinstance(delta, Call):
            calls.append((delta.name, ""))
        elif isinstance(delta, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
        else:
            texts[type(delta)] += delta.text
    return Meaning(texts[Content], tuple(calls), texts[Reasoning])


def read(parser, pieces: Iterable[str]) -> Meaning:
    return meaning([delta for piece in pieces for delta in parser.add(piece)] + parser.finish())


def test_every_format_has_texts():
    assert {known.names[0] for known in CALL_FORMATS} == TEXTS.keys()
    assert len(set(CALL_NAMES)) == len(CALL_NAMES)


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_a_text_says_the_same_wherever_it_is_cut(name, text, expected):
    drawn = random.Random(text)
    cuts = [[text], list(text), *([text[:n], text[n:]] for n in range(1, len(text)))]
    for _ in range(20):
        at = sorted(drawn.choices(range(len(text) + 1), k=drawn.randrange(2, 8)))
        cuts.append([text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)])
    for pieces in cuts:
        assert read(formats(name).parser(TOOLS), pieces) == expected, pieces


@pytest.mark.parametrize("name", TEXTS)
def test_random_texts_of_a_formats_own_words_say_the_same_wherever_they_are_cut(name):
    drawn = random.Random(name)
    whole = "".join(text for text, _ in TEXTS[name])
    words = [
        *formats(name).calls.marks,
        *'{}[]",:\\ \n;aé🦙',
        '{"name": "now", ',
        '"arguments": {',
        "now",
        "get_weather",
    ]
    words += [whole[n : n + 12] for n in range(0, len(whole), 7)]
    for _ in range(150):
        text = "".join(drawn.choices(words, k=drawn.randrange(1, 14)))
        expected = read(formats(name).parser(TOOLS), [text])
        assert read(formats(name).parser(TOOLS), text) == expected, text
        at = drawn.randrange(len(text) + 1)
        assert read(formats(name).parser(TOOLS), [text[:at], text[at:]]) == expected, (text, at)


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_nothing_is_lost_where_there_is_no_call(name, text, expected):
    if not expected.calls and not expected.reasoning and name != "openai":
        assert expected.content == text
    if name != "openai":  # whose channels are told apart without tools too
        assert read(formats(name).parser({}), list(text)) == Meaning(text)


@pytest.mark.parametrize("name", TEXTS)
def test_arguments_are_told_before_their_call_has_ended(name):
    text, expected = next(pair for pair in TEXTS[name] if pair[1].calls)
    (function, arguments), *_ = expected.calls
    parser = formats(name).parser(TOOLS)
    deltas = [(index, delta) for index, piece in enumerate(text) for delta in parser.add(piece)]
    first = next(index for index, delta in deltas if isinstance(delta, Arguments))
    assert deltas[[type(delta) for _, delta in deltas].index(Call)][1] == Call(function)
    assert first < text.index("Paris") + len("Paris")
    assert sum(isinstance(delta, Arguments) for _, delta in deltas) > 3


def test_of_several_calls_so_many_are_told():
    text, _ = TEXTS["hermes"][1]
    assert read(formats("hermes").parser(TOOLS, most_calls=1), list(text)).calls == (
        ("get_weather", '{"city": "Paris"}'),
    )


REASONING = [
    (THINK, False, "<think>\nIt is\n 2. \n</think>\n\nTwo.", Meaning("Two.", (), "It is\n 2.")),
    (THINK, True, "It is 2.</think>Two.\n", Meaning("Two.\n", (), "It is 2.")),
    (THINK, True, "<think>It is 2.</think>Two.", Meaning("Two.", (), "It is 2.")),
    (THINK, False, "Two </think> <think>x</think>", Meaning("Two </think> <think>x</think>")),
    (THINK, False, " Two.", Meaning(" Two.")),
    (THINK, False, "<think>\n\n</think>\n\nTwo.", Meaning("Two.")),
    (THINK, True, "It is, </thi", Meaning("", (), "It is, </thi")),
    (THINK, False, "<think", Meaning("<think")),
    (ALWAYS, True, "2.</think>Two.", Meaning("Two.", (), "2.")),
    (MISTRAL, False, "[THINK]2.[/THINK]Two.", Meaning("Two.", (), "2.")),
    (
        THINK,
        True,
        'I call <tool_call>.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        Meaning("", (("now", "{}"),), "I call <tool_call>."),
    ),
]


@pytest.mark.parametrize(("known", "is_open", "text", "expected"), REASONING)
def test_reasoning_is_what_the_answer_begins_with_up_to_its_mark(known, is_open, text, expected):
    both = AnswerFormats(formats("hermes").calls, known)
    for at in range(len(text) + 1):
        assert read(both.parser(TOOLS, is_reasoning=is_open), [text[:at], text[at:]]) == expected
    assert read(both.parser(TOOLS, is_reasoning=is_open), text) == expected


@pytest.mark.parametrize(
    ("known", "prompt", "is_open"),
    [
        (THINK, "<|im_start|>assistant\n<think>\n", True),
        (THINK, "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        (THINK, "assistant\n", False),
        (ALWAYS, "<｜Assistant｜>", True),
        (ALWAYS, "<｜Assistant｜></think>", False),
        (MISTRAL, "[/INST][THINK]", True),
    ],
)
def test_a_prompt_may_end_within_reasoning(known, prompt, is_open):
    assert known.is_open_after(prompt) is is_open


def test_a_long_answer_takes_time_in_proportion():
    """Work is counted by what a parser keeps: whatever was told is dropped."""
    parser = formats("hermes").parser(TOOLS)
    parser.add('<tool_call>{"name": "now", "arguments": {"a": "')
    for _ in range(2000):
        parser.add("x" * 50)
        assert len(parser._reader.text) <= 200
