"""Grammars by llguidance, which makes a mask from a grammar and a prefix tree of the vocabulary when it is needed.

A mask takes no work ahead that grows with the grammar; so a grammar that nobody saw before is ready at once. Its
limits are those below. What no limit of it bounds, compiling, is tried elsewhere before (`server/grammars.py`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from torch import Tensor

from megatron_star.engine.grammar import GrammarError

LIMITS = {
    "max_items_in_row": 800,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
}
"""Less than llguidance's own: of these, a token costs tens of milliseconds at worst. About 200 optional
properties of an object need as many items in a row."""
LONGEST_ERROR = 400


class TokenPieces(NamedTuple):
    """The tokens of a tokenizer.

    Attributes:
        texts: the bytes of each; None: it does not come in a grammar.
        special: tokens that a grammar can only mean by their names, as `<name>`.
    """

    texts: list[bytes | None]
    special: list[int]


class Vocabulary:
    """What llguidance knows of a tokenizer; a fraction of a second to make, and then shared by all grammars.

    Attributes:
        num_tokens: of the model. Those that the tokenizer does not have never come.
        end_tokens: that end an answer, unless it says otherwise.
    """

    def __init__(
        self, pieces: TokenPieces, encode: Callable[[str], list[int]], end_tokens: Sequence[int], num_tokens: int
    ) -> None:
        """encode: a text without special tokens; for `Matcher.forced`."""
        self.num_tokens, self.end_tokens = num_tokens, frozenset(end_tokens)
        texts = [piece or b"" for piece in pieces.texts] + [b""] * (num_tokens - len(pieces.texts))
        ends = sorted(self.end_tokens) or [len(texts)]
        asked_for = _AsAskedFor(texts, pieces.special, ends[0], encode)
        self.tokenizer = LLTokenizer(TokenizerWrapper(asked_for), n_vocab=len(texts) + 1, eos_token=ends)


class _AsAskedFor:
    """A tokenizer, in the words of llguidance."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], end_token: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end_token
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class LlguidanceGrammar:
    """See `Grammar`."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        """text: as llguidance's functions `grammar_from_...` make it. Raises ValueError."""
        self._vocabulary = vocabulary
        self._start = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=_limits())
        if self._start.is_error():
            raise ValueError(short(self._start.get_error()))

    def matcher(self, end_tokens: Sequence[int]) -> "LlguidanceMatcher":
        """See `Grammar`."""
        return LlguidanceMatcher(self._start.deep_copy(), self._vocabulary, end_tokens)


class LlguidanceMatcher:
    """See `Matcher`."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, end_tokens: Sequence[int]) -> None:
        self._matcher, self._num_words = matcher, -(-vocabulary.num_tokens // 32)
        ends = {token for token in end_tokens if token < vocabulary.num_tokens}
        # llguidance allows those of the vocabulary, and not yet those of this answer alone.
        self._not_ends, self._more_ends = sorted(vocabulary.end_tokens - ends), sorted(ends - vocabulary.end_tokens)

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
            raise GrammarError(short(self._matcher.get_error()))
        return value


def short(error: str) -> str:
    """What llguidance says, in one line and not too long."""
    return " ".join(error.removesuffix("<non-verbose/>").split())[:LONGEST_ERROR]


def _limits() -> LLParserLimits:
    return LLParserLimits(verbose_errors=False, **LIMITS)


def _set_bits(words: NDArray[np.uint32], tokens: Sequence[int], value: bool) -> None:
    for token in tokens:
        bit = np.uint32(1 << (token % 32))
        if value:
            words[token // 32] |= bit
        else:
            words[token // 32] &= ~bit
