"""Grammars by llguidance, which makes each mask when it is needed: of a grammar and a tree of the vocabulary.

So a grammar that nobody saw before is ready at once. What a mask takes is bounded by limits. No limit bounds
compiling: that is tried elsewhere before (`server/grammars.py`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from megatron_star.engine.grammar import GrammarError
from megatron_star.engine.llguidance_vocabulary import Vocabulary, error_of, make_matcher, make_tokenizer


class Llguidance:
    """Compiles grammars for the tokens of one model; from any thread."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        """See `make_tokenizer`."""
        self._vocabulary, self._tokenizer = vocabulary, make_tokenizer(vocabulary, encode)

    def compile(self, text: str) -> "LlguidanceGrammar":
        """See `make_matcher`."""
        return LlguidanceGrammar(make_matcher(self._tokenizer, text), self._vocabulary)


class LlguidanceGrammar:
    """See `Grammar`."""

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary) -> None:
        self._start, self._vocabulary = start, vocabulary

    def matcher(self, end_tokens: Sequence[int]) -> "LlguidanceMatcher":
        """See `Grammar`."""
        return LlguidanceMatcher(self._start.deep_copy(), self._vocabulary, end_tokens)


class LlguidanceMatcher:
    """See `Matcher`."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, end_tokens: Sequence[int]) -> None:
        self._matcher, self._num_words = matcher, -(-vocabulary.num_tokens // 32)
        ends, known = {token for token in end_tokens if token < vocabulary.num_tokens}, vocabulary.end_tokens
        self._not_ends, self._more_ends = sorted({*known} - ends), sorted(ends - {*known})

    @property
    def is_over(self) -> bool:
        """See `Matcher`."""
        return self._checked(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """See `Matcher`."""
        return self._checked(self._matcher.is_accepting())

    def mask(self) -> Tensor:
        """See `Matcher`."""
        words = np.frombuffer(bytearray(self._checked(self._matcher.compute_bitmask())), np.uint32)
        words = words[: self._num_words]
        _set_bits(words, self._not_ends, False)
        # A further end token that a grammar takes for text may come earlier, and ends the answer then, too.
        if self._more_ends and self.may_end:
            _set_bits(words, self._more_ends, True)
        return torch.from_numpy(words.view(np.int32))

    def forced(self) -> list[int]:
        """See `Matcher`."""
        return self._checked(self._matcher.compute_ff_tokens())

    def accept(self, tokens: Sequence[int]) -> int:
        """See `Matcher`."""
        return self._checked(self._matcher.try_consume_tokens(list(tokens)))

    def rewind(self, num_tokens: int) -> None:
        """See `Matcher`."""
        self._checked(self._matcher.rollback(num_tokens))

    def _checked[T](self, value: T) -> T:
        if self._matcher.is_error():
            raise GrammarError(error_of(self._matcher))
        return value


def _set_bits(words: NDArray[np.uint32], tokens: Sequence[int], value: bool) -> None:
    for token in tokens:
        bit = np.uint32(1 << (token % 32))
        if value:
            words[token // 32] |= bit
        else:
            words[token // 32] &= ~bit
