"""How likely given tokens are in their places: log-probabilities at temperature 1, over the whole vocabulary.

logits      [rows, vocab_size], float32
scores      [rows, 2 + 2 * num_top], float64: of each row's token its log-probability and its rank, which is
            1 where no token is likelier; then the ids of the likeliest tokens, and their log-probabilities
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_star.planning.segment import Wave

MOST_SCORED_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 25}
"""At once: 16 and 128 MiB in float32, and as much again for what is made of them."""


class Scoring(NamedTuple):
    """Scores that are wanted of a context: of how many likeliest tokens, and what follows its last token."""

    num_top: int
    next_token: int | None


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


def tokens_after(token_ids: Sequence[int], positions: Sequence[int], scoring: Scoring) -> list[int]:
    """What follows each of these positions of a context; -1 where nothing does."""
    last = -1 if scoring.next_token is None else scoring.next_token
    return [token_ids[p + 1] if p + 1 < len(token_ids) else last for p in positions]


def offsets_in_wave(wave: Wave) -> dict[int, int]:
    """Where each segment's scores begin in those of a wave, by its first token."""
    offsets, num_tokens = {}, 0
    for segment in wave:
        offsets[segment.start] = num_tokens
        num_tokens += segment.num_tokens
    return offsets
