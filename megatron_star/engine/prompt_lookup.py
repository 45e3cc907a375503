"""Prompt lookup: an answer that quotes goes on as the place went on where its last tokens stood before.

That place may be in the context or in the tail, that is in the query and the answer so far. The index of a
context is shared by all requests on it, and by contexts that extend it; it goes when the context does.
"""

from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

from megatron_star.engine.answer import Answer
from megatron_star.engine.cached_context import CachedContext
from megatron_star.engine.ngram_index import MOST_MATCHED, Match, NgramIndex
from megatron_star.engine.proposer import Guess
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS

TOKENS_INDEXED_AT_ONCE = 1 << 15
"""Of contexts in one turn: about a millisecond."""
CHANCES = (0.3, 0.5, 0.7, 0.85)
"""That a token is right after a match of 2 or 3 tokens, of 4 to 7, of 8 to 15, and of more."""
NO_GUESS = Guess([])


class PromptLookup:
    """See `Proposer`."""

    def __init__(self) -> None:
        self._contexts: WeakKeyDictionary[CachedContext, NgramIndex] = WeakKeyDictionary()
        self._texts: dict[int, _Text] = {}

    def advance(self, answers: Collection[Answer]) -> None:
        """See `Proposer`: index a part of the contexts."""
        left = TOKENS_INDEXED_AT_ONCE
        for context in {answer.context: None for answer in answers}:
            for one in context.chain():
                if left:
                    left -= self._index_some(one, left)

    def guess(self, answers: Sequence[Answer]) -> list[Guess]:
        """See `Proposer`."""
        return [self._text(answer).guess(answer.tokens) for answer in answers]

    def forget(self, answer: Answer) -> None:
        """See `Proposer`."""
        self._texts.pop(answer.id, None)

    def _index_some(self, context: CachedContext, most: int) -> int:
        """Index so many more tokens of a context at most; returns how many."""
        index = self._index(context)
        first = index.start + index.num_tokens
        new = context.token_ids[first : first + most]
        index.append(new)
        return len(new)

    def _index(self, context: CachedContext) -> NgramIndex:
        """Of what a context has beyond the one that it extends; it may not be complete yet."""
        if context not in self._contexts:
            start, tokens = context.plan.start, context.token_ids
            before = tokens[max(0, start - MOST_MATCHED) : start]
            self._contexts[context] = NgramIndex(start, len(tokens) - start, before)
        return self._contexts[context]

    def _text(self, answer: Answer) -> "_Text":
        if answer.id not in self._texts:
            indices, end = [], answer.plan.num_tokens
            for context in answer.context.chain():
                indices.append((self._index(context), end))
                end = context.plan.start  # what is extended may go on in another way
            self._texts[answer.id] = _Text(answer, indices)
        return self._texts[answer.id]


class _Text:
    """Context, query and answer of one request. Places count from the context's first token."""

    def __init__(self, answer: Answer, contexts: list[tuple[NgramIndex, int]]) -> None:
        """contexts: indices, and the place that what is found in them ends before."""
        self._context_tokens, self._contexts = answer.request.context_tokens, contexts
        self._tail = list(answer.request.query_tokens)
        self._num_context, self._num_query = len(self._context_tokens), len(self._tail)
        before = self._context_tokens[-MOST_MATCHED:]
        self._tail_index = NgramIndex(self._num_context, answer.num_tail_tokens, before)
        self._tail_index.append(self._tail)
        self._match: Match | None = None

    def guess(self, answer_tokens: Sequence[int]) -> Guess:
        """What comes after these tokens; more of them at each call."""
        new = answer_tokens[len(self._tail) - self._num_query :]
        for token in new:
            self._follow(token)
            self._tail.append(token)
        self._tail_index.append(new)
        self._match = self._match or self._longest_match()
        if not self._match:
            return NO_GUESS
        kind = min(self._match.length.bit_length() - 2, len(CHANCES) - 1)
        return Guess(self._from(self._match.place), kind, CHANCES[kind])

    def _follow(self, token: int) -> None:
        """If the answer goes on as the text did there, that is still the longest match."""
        match = self._match
        if match and self._at(match.place) == token:
            self._match = Match(match.length + 1, match.place + 1)
        else:
            self._match = None

    def _longest_match(self) -> Match | None:
        last = self._tail[-MOST_MATCHED:]
        missing = MOST_MATCHED - len(last)
        last = self._context_tokens[max(0, self._num_context - missing) :][:missing] + last
        found = [index.longest_match(last, end) for index, end in self._contexts]
        # Not where they stand themselves.
        found.append(self._tail_index.longest_match(last, self._num_context + len(self._tail) - 1))
        return max(filter(None, found), default=None)

    def _at(self, place: int) -> int:
        in_context = place < self._num_context
        return self._context_tokens[place] if in_context else self._tail[place - self._num_context]

    def _from(self, place: int) -> list[int]:
        """What stands from there on; where the text ends, it begins again there."""
        tokens = self._context_tokens[place : place + MOST_PROPOSED_TOKENS]
        start = max(0, place - self._num_context)
        tokens += self._tail[start : start + MOST_PROPOSED_TOKENS - len(tokens)]
        period = len(tokens)
        while len(tokens) < MOST_PROPOSED_TOKENS:
            tokens.append(tokens[-period])
        return tokens
