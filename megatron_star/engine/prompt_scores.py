"""How likely the tokens of a prompt are, as they become known; read by whoever asked, in any thread."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_star.algorithm.token_scores import num_columns


class TokenScore(NamedTuple):
    """
    Attributes:
        logprob: natural logarithm, at temperature 1.
        rank: 1 where no token is likelier.
        top: the likeliest tokens in its place, with theirs, falling.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class PromptScores:
    """Scores of context and query; the first token of all follows nothing and has none."""

    def __init__(self, num_tokens: int, num_top: int) -> None:
        """num_tokens: of context and query."""
        self.num_tokens, self.num_top = num_tokens, num_top

    @cached_property
    def _scores(self) -> Tensor:
        """Made with the first scores: many prompts may wait for theirs."""
        return torch.full((self.num_tokens, num_columns(self.num_top)), torch.nan, dtype=torch.float64)

    def put(self, first: int, scores: Tensor) -> bool:
        """Scores [tokens, columns] of the tokens from this one on; whether all of them are finite."""
        self._scores[first : first + len(scores)] = scores
        return bool(scores.isfinite().all())

    def to_list(self) -> Sequence[TokenScore | None]:
        """Of each token; takes a while for many."""
        columns = self._scores[1:].split([1, 1, self.num_top, self.num_top], dim=1)
        logprobs, ranks, ids, values = (column.tolist() for column in columns)
        found = [
            TokenScore(logprob, int(rank), [(int(token), value) for token, value in zip(*top, strict=True)])
            for (logprob,), (rank,), *top in zip(logprobs, ranks, ids, values, strict=True)
        ]
        return [None, *found]
