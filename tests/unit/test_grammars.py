"""Grammars: masks are those of a slow twin; whatever somebody sends is refused or served in bounded time."""

import asyncio
import json
import random
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import regex
import torch
from small_tokenizers import small_tokenizer

from megatron_star.config import FieldError
from megatron_star.engine import guide as guide_module
from megatron_star.engine.grammar import GrammarError
from megatron_star.engine.guide import Guide
from megatron_star.engine.llguidance_grammar import Llguidance
from megatron_star.engine.llguidance_vocabulary import Vocabulary
from megatron_star.server import grammars as grammars_module
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.grammar_text import grammar_text
from megatron_star.server.grammars import MOST_GRAMMAR_BYTES, TOO_MUCH, Grammars

TEXTS = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"aab",
    b"0",
    b"1",
    b"01",
    b"-",
    b"b-",
    "é".encode(),
    b"\xc3",
    b"\xa9",
    b"",
]
END, OTHER_END, SPECIAL = len(TEXTS), 0, len(TEXTS) + 1
VOCABULARY = Vocabulary([*TEXTS, b"<end>", b"<special>", None], [END, SPECIAL], [END])


def longest_tokens(text: str) -> list[int]:
    left, tokens = text.encode(), []
    while left:
        token = max(
            (t for t, piece in enumerate(TEXTS) if piece and left.startswith(piece)),
            key=lambda t: len(TEXTS[t]),
        )
        tokens.append(token)
        left = left[len(TEXTS[token]) :]
    return tokens


LIBRARY = Llguidance(VOCABULARY, longest_tokens)


def compiled(kind: str, text: str):
    return LIBRARY.compile(grammar_text(GrammarSpec(kind, text, "f")))


def allowed(mask: torch.Tensor) -> set[int]:
    assert mask.dtype == torch.int32 and mask.shape == (1,)
    return {token for token in range(32) if mask[0].item() >> token & 1}


def by_the_twin(pattern: str, text: bytes) -> set[int]:
    """Tokens after which the text can still become one that the pattern matches: each is tried."""

    def lives(more: bytes) -> bool:
        as_bytes = regex.compile(pattern.encode())
        return bool(as_bytes.fullmatch(text + more, partial=True))

    tokens = {token for token, piece in enumerate(TEXTS) if piece and lives(piece)}
    return tokens | ({END} if regex.fullmatch(pattern.encode(), text) else set())


@pytest.mark.parametrize(
    "pattern", ["(a|b)*", "(ab|ba)+0?", "[01]{2,5}(-[ab]+)*", "(a|é)+b{1,3}", "-?(0|1[01]*)"]
)
def test_a_mask_has_the_tokens_that_a_slow_twin_finds(pattern):
    draw = random.Random(0)
    for _ in range(10):
        matcher, text = compiled("regex", pattern).matcher([END]), b""
        for _ in range(12):
            found, expected = allowed(matcher.mask()), by_the_twin(pattern, text)
            if forced := matcher.forced():
                assert found == {forced[0]} and found <= expected
            else:
                assert found == expected, text
            token = draw.choice(sorted(found))
            if token == END:
                break
            assert matcher.accept([token]) == 1
            text += TEXTS[token]


def test_an_answer_may_end_with_its_own_end_tokens_and_no_others():
    matcher = compiled("regex", "b+").matcher([OTHER_END])
    assert allowed(matcher.mask()) == {1}
    matcher.accept([1])
    assert allowed(matcher.mask()) == {1, OTHER_END} and matcher.may_end and not matcher.is_over


def test_the_last_token_of_a_model_without_end_tokens_is_one_like_others():
    library = Llguidance(
        Vocabulary([b"a", b"b"], [], []), lambda text: [b"ab".index(c) for c in text.encode()]
    )
    matcher = library.compile(grammar_text(GrammarSpec("regex", "a*b+a", "f"))).matcher([])
    assert allowed(matcher.mask()) == {0, 1} and matcher.accept([1]) == 1
    assert allowed(matcher.mask()) == {0, 1} and matcher.accept([0]) == 1 and matcher.is_over


def test_tokens_that_did_not_come_leave_no_trace():
    matcher = compiled("regex", "(ab|ba)+0").matcher([END])
    before = allowed(matcher.mask())
    assert matcher.accept([0, 1, 5, 5]) == 3 and matcher.is_over
    matcher.rewind(3)
    assert allowed(matcher.mask()) == before and not matcher.is_over


def test_answers_on_one_grammar_do_not_meet():
    grammar = compiled("regex", "a0|b1")
    first, second = grammar.matcher([END]), grammar.matcher([END])
    first.accept([0])
    assert allowed(second.mask()) == {0, 1}


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_object", "", '{"a": [1]}', "[1]"),
        ("json_schema", '{"type": "integer"}', "-3", "3.5"),
        (
            "json_schema",
            '{"properties": {"a": {"const": 1}}, "type": "object"}',
            '{"a": 1}',
            '{"a": 1, "b": 2}',
        ),
        (
            "json_schema",
            '{"items": {"$ref": "#/$defs/d"}, "$defs": {"d": {"type": "object", "properties": {"a": {}}}}}',
            '[{"a": {"c": 3}}]',
            '[{"b": 1}]',
        ),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}}',
            '{"a": 1, "b": null}',
            '{"a": 1, "b": 2}',
        ),
        (
            "json_schema",
            '{"allOf": [{"type": "object", "properties": {"a": {}}}, {"properties": {"b": {"const": 2}}}]}',
            '{"a": 1, "b": 2}',
            '{"a": 1, "b": 3}',
        ),
        ("regex", "^a|b/$", "b/", "ab"),
        ("choice", json.dumps(['"x"\n', "é\\", "", "ab"]), '"x"\n', "abc"),
        ("choice", json.dumps(['"x"\n', "é\\", "ab"]), "é\\", "é"),
        ("lark", 'start: "a" b\nb: "b"+', "abb", "a"),
        ("lark", 'root ::= "a" [b-c]*', "abcb", "b"),
        (
            "json_schema",
            json.dumps({"x-guidance": {"whitespace_pattern": ""}, "const": {"a": 1}}),
            '{"a":1}',
            '{"a": 1}',
        ),
        ("json_schema", '{"const": {"a": 1}}', '{\n  "a": 1\r\n}', '{"a"\n\n\n: 1}'),
    ],
)
def test_each_kind_of_grammar_takes_whole_texts_and_no_others(kind, text, good, bad):
    bytes_alone = Llguidance(
        Vocabulary([bytes([b]) for b in range(256)], [], []), lambda text: list(text.encode())
    )
    for answer, is_good in ((good, True), (bad, False)):
        matcher = bytes_alone.compile(grammar_text(GrammarSpec(kind, text, "f"))).matcher([])
        num_taken = matcher.accept(list(answer.encode()))
        assert (num_taken == len(answer.encode()) and matcher.may_end) == is_good


@pytest.fixture(scope="module")
def grammars():
    tokenizer = small_tokenizer("byte_level")
    made = Grammars(tokenizer, [2], len(tokenizer))
    yield made
    made.close()


def found(grammars: Grammars, kind: str, text: str):
    return asyncio.run(grammars.compiled(GrammarSpec(kind, text, "the.field")))


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + "{}" + "}" * depth


def chained(num: int) -> str:
    """Rules of which each names the next: llguidance ends the process at some thousand of them."""
    return "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(num)) + f'\na{num}: "x"'


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", json.dumps({"enum": ["x" * MOST_GRAMMAR_BYTES]}), "the limit is 262144"),
        ("json_schema", nested(1000), "recursion limit"),
        ("json_schema", '{"$ref": "#"}', "NoExtension"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "Unimplemented keys: .*uniqueItems"),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": false}, "required": ["a"]}',
            "[Uu]nsatisfiable",
        ),
        ("regex", "(" * 20000 + "a" + ")" * 20000, "the.field: .*regex"),
        ("regex", "(a", "unclosed group"),
        ("lark", "start: nothing", "unknown name"),
        ("lark", "root ::= (", "the.field: .*"),
        ("lark", chained(10000), re.escape(TOO_MUCH)),
        (
            "lark",
            "start: T\nT: " + " & ".join(f"/.*(a|b){{{i}}}.*/" for i in range(1, 30)),
            re.escape(TOO_MUCH),
        ),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_with_its_field(grammars, kind, text, reason):
    with pytest.raises(FieldError, match=reason) as caught:
        found(grammars, kind, text)
    assert caught.value.field == "the.field" and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", nested(100)),
        ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(5000)]})),
        (
            "json_schema",
            '{"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}',
        ),
        ("json_schema", '{"type": "array", "minItems": 1000000}'),
        ("regex", "(.*a){30}.*b"),
        ("regex", "(a|b)*a(a|b){200}"),
    ],
)
def test_a_grammar_that_only_looks_hostile_is_served(grammars, kind, text):
    assert found(grammars, kind, text).matcher([2]).mask().count_nonzero()


def test_what_was_compiled_or_refused_is_kept(grammars, monkeypatch):
    kept = found(grammars, "regex", "kept+")
    with pytest.raises(FieldError):
        found(grammars, "regex", "(refused")
    monkeypatch.setattr(grammars, "_compile", None)
    assert found(grammars, "regex", "kept+") is kept
    with pytest.raises(FieldError):
        found(grammars, "regex", "(refused")


def test_as_many_grammars_are_kept_as_there_is_room_for(grammars, monkeypatch):
    monkeypatch.setattr(grammars_module, "MOST_KEPT", 2)
    monkeypatch.setattr(grammars, "_kept", OrderedDict())
    first = found(grammars, "regex", "1+")
    for text in ("2+", "1+", "3+"):
        found(grammars, "regex", text)
    assert found(grammars, "regex", "1+") is first and len(grammars._kept) == 2


def test_grammars_are_compiled_in_a_thread_and_tried_in_a_process_of_their_own(grammars, monkeypatch):
    threads, compile_one = [], grammars._compile
    monkeypatch.setattr(
        grammars,
        "_compile",
        lambda spec: (threads.append(threading.current_thread().name), compile_one(spec))[1],
    )
    found(grammars, "regex", "in a thread")
    assert threads == ["grammar_0"] and grammars._trial._process.poll() is None


class Scripted:
    """A matcher that allows one token after the other, and notes who asks; then it fails."""

    is_over = may_end = False

    def __init__(self, tokens):
        self.tokens, self.place, self.threads = tokens, 0, []

    def mask(self):
        self.threads.append(threading.current_thread().name)
        if self.place == len(self.tokens):
            raise GrammarError("too complex")
        return torch.tensor([1 << self.tokens[self.place]], dtype=torch.int32)

    def forced(self):
        return self.tokens[self.place :]

    def accept(self, tokens):
        is_next = tokens == self.tokens[self.place : self.place + 1]
        self.place += is_next
        return int(is_next)

    def rewind(self, num_tokens):
        self.place -= num_tokens


@pytest.fixture
def workers():
    with ThreadPoolExecutor(2, "mask") as pool:
        yield pool


def masks_of(guide: Guide, num_rows: int):
    return [None if mask is None else allowed(mask) for mask in guide.masks(num_rows)]


def test_masks_are_made_in_other_threads_also_those_after_proposals(workers):
    matcher = Scripted([3, 4, 5])
    guide = Guide(matcher, workers, proposes=True)
    assert guide.forced == [3, 4, 5]
    guide.follow([3, 4])
    assert masks_of(guide, 3) == [{3}, {4}, {5}]
    assert matcher.place == 0 and all(name.startswith("mask") for name in matcher.threads)


def test_proposals_are_followed_up_to_one_that_the_grammar_forbids(workers):
    guide = Guide(Scripted([3, 4, 5]), workers, proposes=False)
    assert guide.forced == []
    guide.follow([3, 9, 5])
    assert masks_of(guide, 4) == [{3}, {4}, None, None] and guide.error is None


def test_a_grammar_that_fails_is_an_error_of_its_answer_and_raises_nothing(workers):
    guide = Guide(Scripted([3]), workers, proposes=True)
    guide.accept(3)
    guide.look_ahead()
    assert masks_of(guide, 1) == [None] and "too complex" in guide.error


def test_a_library_that_breaks_is_an_error_of_its_answer(workers):
    matcher = Scripted([3])
    matcher.mask = lambda: 1 / 0
    guide = Guide(matcher, workers, proposes=True)
    assert masks_of(guide, 1) == [None] and "division by zero" in guide.error


def test_a_mask_that_never_comes_is_not_waited_for(workers, monkeypatch):
    monkeypatch.setattr(guide_module, "SECONDS_FOR_MASKS", 0.01)
    matcher, never = Scripted([3]), threading.Event()
    matcher.mask = never.wait
    guide = Guide(matcher, workers, proposes=True)
    assert masks_of(guide, 1) == [None] and "it took more than" in guide.error
    never.set()
