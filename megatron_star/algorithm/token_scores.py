"""How likely given tokens are in their places: log-probabilities at temperature 1, over the whole vocabulary.

logits      [rows, vocab_size], float32
scores      [rows, 2 + 2 * num_top], float64: of each row's token its log-probability and its rank, which is
            1 where no token is likelier; then the ids of the likeliest tokens, and their log-probabilities
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_SCORED_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 25}
"""At once: 16 and 128 MiB in float32, and as much again for what is made of them."""


class ScoredRows(NamedTuple):
    """Rows of a forward pass [n] that are followed by these tokens [n], both int64 on the device."""

    rows: Tensor
    tokens: Tensor
    num_top: int


def num_columns(num_top: int) -> int:
    """Of scores with so many likeliest tokens."""
    return 2 + 2 * num_top


def score_rows(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Scores of tokens [rows], int64, one in the place that each row of logits is for."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None])
    rank = (logits > chosen).sum(-1, keepdim=True) + 1
    values, ids = logits.topk(num_top, dim=-1)
    columns = (chosen - normaliser, rank, ids, values - normaliser)
    return torch.cat([column.double() for column in columns], dim=1)
