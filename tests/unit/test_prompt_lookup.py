"""Prompt lookup's guesses: what followed the last tokens before, in context, query or answer."""

from types import SimpleNamespace

from megatron_star.engine import prompt_lookup
from megatron_star.engine.prompt_lookup import PromptLookup


class _Context:
    """As much of a CachedContext as prompt lookup reads."""

    def __init__(self, tokens, parent=None, start=0):
        self.token_ids, self.parent = tokens, parent
        self.plan = SimpleNamespace(start=start, num_tokens=len(tokens))

    def chain(self):
        return [self, *(self.parent.chain() if self.parent else [])]


def _answer(context, query, tokens=(), answer_id=0):
    request = SimpleNamespace(context_tokens=context.token_ids, query_tokens=list(query))
    return SimpleNamespace(
        id=answer_id,
        context=context,
        request=request,
        tokens=list(tokens),
        plan=context.plan,
        num_tail_tokens=500,
    )


def _guess(lookup, answer):
    lookup.advance([answer])
    return lookup.guess([answer])[0]


def test_the_place_of_the_longest_match_goes_on():
    context = _Context([1, 2, 3, 50, 51, 7, 2, 3, 60, 61])
    assert _guess(PromptLookup(), _answer(context, [9, 1, 2], [3])).tokens[:4] == [50, 51, 7, 2]
    assert _guess(PromptLookup(), _answer(context, [9, 8, 2], [3])).tokens[:2] == [60, 61]
    assert _guess(PromptLookup(), _answer(context, [9, 8], [40])).tokens == []


def test_an_answer_that_goes_on_as_guessed_is_guessed_from_there_and_one_that_does_not_is_looked_up_anew():
    context = _Context([*range(100, 140), 5, 6, *range(200, 240)])
    lookup, answer = PromptLookup(), _answer(context, [9, 110], [111])
    first = _guess(lookup, answer)
    assert first.tokens == list(range(112, 128))
    answer.tokens += [112, 113, 114]
    later = _guess(lookup, answer)
    assert later.tokens == [*range(115, 131)] and later.kind > first.kind
    answer.tokens += [5, 6]
    assert _guess(lookup, answer).tokens == list(range(200, 216))


def test_an_answer_in_circles_is_guessed_to_go_on_so():
    answer = _answer(_Context([]), [1, 2, 3, 4], [2, 3])
    assert _guess(PromptLookup(), answer).tokens == [4, 2, 3] * 5 + [4]


def test_a_context_that_begins_as_another_finds_what_they_share_and_nothing_else_of_it():
    parent = _Context([1, 2, 3, 4, 5, 6, 7, 8])
    child = _Context([1, 2, 3, 4, 30, 31, 32], parent, start=4)
    lookup = PromptLookup()
    assert _guess(lookup, _answer(child, [2], [3], 0)).tokens[:3] == [4, 30, 31]
    assert _guess(lookup, _answer(child, [6], [7], 1)).tokens == []
    assert _guess(lookup, _answer(child, [4], [30], 2)).tokens[:2] == [31, 32]
    assert _guess(lookup, _answer(parent, [6], [7], 3)).tokens[:1] == [8]


def test_a_context_is_indexed_by_and_by_once_for_all_and_goes_with_it(monkeypatch):
    monkeypatch.setattr(prompt_lookup, "TOKENS_INDEXED_AT_ONCE", 100)
    context, lookup = _Context(list(range(1000, 1450))), PromptLookup()
    answers = [_answer(context, [9, 1400], [1401], answer_id) for answer_id in range(2)]
    found = []
    for _ in range(6):
        lookup.advance(answers)
        (guess, other) = lookup.guess(answers)
        assert guess == other
        found.append(bool(guess.tokens))
    assert found == [False] * 4 + [True] * 2
    for answer in answers:
        lookup.forget(answer)
    assert len(lookup._contexts) == 1 and not lookup._texts
    del answers, answer, context
    assert not lookup._contexts
