"""What a request wants of tokens beyond temperature, top_k and top_p; the neutral values change nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from megatron_star.config import FieldError

MOST_REPETITION = 100.0
"""Far beyond any use; its inverse is the least."""
LARGEST_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """How logits are changed before a token is chosen.

    Attributes:
        min_p: tokens with less than this share of the likeliest one's probability are left out; 0 is off.
        repetition_penalty: of tokens that the prompt or the answer has, positive logits are divided by it and
            others multiplied with it (arXiv 1909.05858); 1 is off.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: the same, as many times as the answer has them.
        logit_bias: tokens, and what is added to their logits.
        allowed_tokens: no other tokens are chosen; None allows all.
        bad_words: sequences of tokens that do not come in the answer.
    """

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    def check(self, vocab_size: int) -> None:
        """Raises FieldError, naming the value and the bound."""
        if not 0.0 <= self.min_p <= 1.0:
            raise FieldError(f"min_p is {self.min_p}: it must be from 0 to 1", "min_p")
        if not 1 / MOST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise FieldError(
                f"repetition_penalty is {self.repetition_penalty}: "
                f"it must be from {1 / MOST_REPETITION} to {MOST_REPETITION}",
                "repetition_penalty",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not isfinite(getattr(self, name)):
                raise FieldError(f"{name} is {getattr(self, name)}: it must be a finite number", name)
        for token, bias in self.logit_bias:
            if not abs(bias) <= LARGEST_BIAS:
                raise FieldError(
                    f"logit_bias of {token} is {bias}: it must be from {-LARGEST_BIAS} to {LARGEST_BIAS}",
                    "logit_bias",
                )
        biased = (token for token, _ in self.logit_bias)
        bad = (token for word in self.bad_words for token in word)
        for field, tokens in (
            ("logit_bias", biased),
            ("allowed_token_ids", self.allowed_tokens or ()),
            ("bad_words", bad),
        ):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise FieldError(
                        f"{field}: token id {token} is outside of the vocabulary of {vocab_size} tokens",
                        field,
                    )

    def check_leaves_some(self, end_tokens: Iterable[int]) -> None:
        """Raises FieldError if no token is left to begin with.

        end_tokens: those that may not come either, at first.
        """
        if self.allowed_tokens is None:
            return
        never = {word[0] for word in self.bad_words if len(word) == 1} | set(end_tokens)
        if never.issuperset(self.allowed_tokens):
            raise FieldError(
                "allowed_token_ids: bad_words and min_tokens leave none of them", "allowed_token_ids"
            )
