"""What llguidance knows of a model's tokens, and the limits that it keeps to. Needs no torch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LIMITS = {
    "max_items_in_row": 800,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
}
"""Less than llguidance's own, so that a token of a hostile grammar takes tens of milliseconds at worst. About
200 optional properties of one object need as many items in a row."""
LONGEST_ERROR = 400


class Vocabulary(NamedTuple):
    """The tokens of a model.

    Attributes:
        texts: the bytes of each token of the model; with none, or None, it does not come in a grammar.
        special: tokens that a grammar can only mean by their names, as `<name>`.
        end_tokens: that end an answer, unless its request says otherwise.
    """

    texts: list[bytes | None]
    special: list[int]
    end_tokens: list[int]

    @property
    def num_tokens(self) -> int:
        """Of the model."""
        return len(self.texts)

    def to_json(self) -> list[Any]:
        """A form that survives JSON."""
        texts = [text if text is None else text.decode("latin-1") for text in self.texts]
        return [texts, self.special, self.end_tokens]

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        """The vocabulary of `to_json`."""
        texts, *others = values
        return cls([text if text is None else text.encode("latin-1") for text in texts], *others)


def make_tokenizer(vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> LLTokenizer:
    """A fraction of a second to make, and then shared by all grammars.

    encode: a text without special tokens. Where a grammar leaves one text only, the tokens that this makes of
        it are the only ones that may come.
    """
    # One more, which never comes, ends answers of models that have no end token.
    texts = [*(text or b"" for text in vocabulary.texts), b""]
    ends = vocabulary.end_tokens or [len(texts) - 1]
    as_asked_for = _AsAskedFor(texts, vocabulary.special, ends[0], encode)
    return LLTokenizer(TokenizerWrapper(as_asked_for), n_vocab=len(texts), eos_token=ends)


def make_matcher(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """At the beginning of what a function `LLMatcher.grammar_from_...` wrote. Raises ValueError."""
    limits = LLParserLimits(verbose_errors=False, **LIMITS)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(error_of(matcher))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """What llguidance says, in one line and not too long."""
    error = matcher.get_error().partition("<backtrace>")[0].removesuffix("<non-verbose/>")
    return " ".join(error.split())[:LONGEST_ERROR]


class _AsAskedFor:
    """A tokenizer, in the words of llguidance."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Sequence[int],
        end_token: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end_token
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
