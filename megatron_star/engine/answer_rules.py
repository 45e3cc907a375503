"""The rules of one answer: which tokens they concern, from its prompt and from what came so far.

What they need of the whole vocabulary is on the device of the logits, made with the answer's first row:

    bias        [vocab_size], float32: what is added to logits, whatever came; -inf: it never comes
    counts      [vocab_size], int32: how often the answer has a token, and `IN_PROMPT` where its prompt has it
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_star.engine.token_rules import TokenRules

IN_PROMPT = 1 << 30
"""More than the tokens of any answer."""
TOKENS_AT_ONCE = 1 << 16
"""Of a long prompt: no more, so that other threads come between."""


class AnswerRules:
    """
    Attributes:
        rules: what was asked.
        tokens: of the answer; the engine adds to them.
    """

    def __init__(self, rules: TokenRules, prompt: Sequence[Sequence[int]], tokens: list[int]) -> None:
        """Looks at all of the prompt where repetition is penalised; so not in a thread that others wait for.

        Args:
            prompt: its tokens, in parts that follow each other.
        """
        self.rules, self.tokens = rules, tokens
        self._in_prompt = torch.tensor(
            _distinct(prompt) if rules.repetition_penalty != 1.0 else [], dtype=torch.int64
        )
        allowed = rules.allowed_tokens
        self._allowed = None if allowed is None else torch.tensor(allowed, dtype=torch.int64)
        longest = max(map(len, rules.bad_words), default=0)
        self._before = [token for part in prompt for token in part[max(0, len(part) - longest) :]]
        self._bad_words: dict[int, list[tuple[int, ...]]] = {}
        for word in rules.bad_words:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)
        self._bias: Tensor | None = None
        self._counts: Tensor | None = None
        self._num_counted = 0

    @property
    def has_bias(self) -> bool:
        """Logits change whatever came."""
        rules = self.rules
        return bool(
            rules.logit_bias
            or rules.allowed_tokens is not None
            or any(len(word) == 1 for word in rules.bad_words)
        )

    @property
    def has_penalties(self) -> bool:
        """Logits change with what came."""
        rules = self.rules
        return rules.repetition_penalty != 1.0 or bool(rules.presence_penalty or rules.frequency_penalty)

    def forbidden(self, proposed: Sequence[int]) -> list[int]:
        """Tokens that would complete a bad word, after the prompt, the answer and these further tokens."""
        if not self._bad_words:
            return []
        longest = max(map(len, self.rules.bad_words))
        came = [*self._before, *self.tokens[-longest:], *proposed][-longest:]
        words = self._bad_words.get(came[-1], ()) if came else ()
        return [word[-1] for word in words if tuple(came[-len(word) + 1 :]) == word[:-1]]

    def bias(self, vocab_size: int, device: torch.device) -> Tensor:
        """See the top."""
        if self._bias is None:
            bias = torch.full((vocab_size,), 0.0 if self._allowed is None else -math.inf)
            if self._allowed is not None:
                bias[self._allowed] = 0.0
            for token, value in self.rules.logit_bias:
                bias[token] += value
            bias[[word[0] for word in self.rules.bad_words if len(word) == 1]] = -math.inf
            self._bias = bias.to(device)
        return self._bias

    def counts(self, vocab_size: int, device: torch.device) -> Tensor:
        """Of all tokens but those that are `uncounted`."""
        if self._counts is None:
            counts = torch.zeros(vocab_size, dtype=torch.int32)
            counts[self._in_prompt] = IN_PROMPT
            self._counts = counts.to(device)
        return self._counts

    def uncounted(self) -> list[int]:
        """Tokens of the answer that came since `keep`."""
        return self.tokens[self._num_counted :]

    def keep(self, counts: Tensor) -> None:
        """`counts` of all tokens that came by now."""
        self._counts, self._num_counted = counts, len(self.tokens)


def _distinct(parts: Iterable[Sequence[int]]) -> list[int]:
    found: set[int] = set()
    for part in parts:
        for start in range(0, len(part), TOKENS_AT_ONCE):
            found.update(part[start : start + TOKENS_AT_ONCE])
    return list(found)
