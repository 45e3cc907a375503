"""How one token is chosen from one row of logits, and the token that was."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor

from megatron_star.engine.answer_rules import AnswerRules


class Choice(NamedTuple):
    """A token that was chosen, with its log-probability before all rules, at temperature 1.

    Attributes:
        top: the likeliest tokens in its place with theirs, as many as the row asked for; the likeliest first.
        is_finite: all logits of the row are numbers; else nothing else is meant.
        is_possible: the rules left a token; else `token` is none of them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    is_finite: bool = True
    is_possible: bool = True


class RowToSample(NamedTuple):
    """How a token is chosen from one row of logits.

    Attributes:
        sampling: temperature, top_k and top_p are read; top_p is taken of what top_k leaves.
        random: at least 0 and below 1, see `uniform`.
        forbidden: tokens that must not be chosen; log-probabilities are as without.
        rules: of the row's answer.
        proposed: tokens of the answer that this row takes for granted, after those that it has.
        mask: tokens that may be chosen, as bits of [ceil(vocab_size / 32)] int32 words on the host.
        num_top_logprobs: see `Choice`.
    """

    sampling: SamplingParams
    random: float
    forbidden: Sequence[int] = ()
    rules: AnswerRules | None = None
    proposed: Sequence[int] = ()
    mask: Tensor | None = None
    num_top_logprobs: int = 0

    @property
    def is_drawn(self) -> bool:
        """It is not just the most likely token that is allowed."""
        return self.sampling.temperature > 0.0 and self.sampling.top_k != 1

    @property
    def is_filtered(self) -> bool:
        """It is drawn, and by the order of tokens."""
        return self.is_drawn and (self.sampling.top_k > 1 or 0.0 < self.sampling.top_p < 1.0)

    @property
    def min_p(self) -> float:
        """See `TokenRules`."""
        return self.rules.rules.min_p if self.rules else 0.0
