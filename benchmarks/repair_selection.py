"""Which of its keys a block names: one score a key, and the keys with the highest.

Nothing but the block itself is looked at, so that the choice depends on no question and no other block.
Shapes: b tokens of the block, np query heads, ng KV heads, hn head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from benchmarks.repair_candidates import Candidate

ROWS, POOLING = 32, 5


class NamedKeys(NamedTuple):
    """Of one block, the best first.

    Attributes:
        positions: [ng, l], of the context's tokens.
        scores: [ng, l], float32.
    """

    positions: Tensor
    scores: Tensor


class Block(NamedTuple):
    """Queries [b, np, hn] and keys [b, ng, hn] of one block, the first of which is token `start`.

    Attributes:
        num_anchor: of its first keys, those that all see anyway.
    """

    start: int
    query: Tensor
    key: Tensor
    num_anchor: int
    softmax_scale: float


def named_keys(candidate: Candidate, block: Block) -> NamedKeys:
    """At most `passed` keys for each KV head, none of the anchor's."""
    scores = SCORES[candidate.select](candidate, block)
    pooling = candidate.pooling or (POOLING if candidate.select == "scores" else 1)
    if pooling > 1:
        scores = max_pool1d(scores[None], pooling, stride=1, padding=pooling // 2)[0]
    scores[:, : block.num_anchor] = -torch.inf
    num = min(candidate.passed, scores.size(1) - block.num_anchor)
    best = scores.topk(num, dim=-1)
    return NamedKeys(best.indices + block.start, best.values)


def _distinct(candidate: Candidate, block: Block) -> Tensor:
    """KeyDiff (arXiv 2504.15364): minus the cosine to the mean of all normalised keys."""
    unit = normalize(block.key.float(), dim=-1)
    mean = normalize(unit.mean(0, keepdim=True), dim=-1)
    return -(unit * mean).sum(-1).T


def _attended(candidate: Candidate, block: Block) -> Tensor:
    """Softmax weights that the last rows of the block give, over its own keys, summed over its heads too.

    SnapKV (arXiv 2404.14469), with the block's own end in the question's place.
    """
    (b, np, hn), ng = block.query.shape, block.key.size(1)
    rows = min(candidate.rows or ROWS, b)
    query = block.query[b - rows :].float().view(rows, ng, np // ng, hn).permute(1, 2, 0, 3)
    logits = query @ block.key.float().permute(1, 2, 0)[:, None] * block.softmax_scale  # [ng, np/ng, rows, b]
    is_later = torch.arange(b) > torch.arange(b - rows, b)[:, None]
    return logits.masked_fill(is_later, -torch.inf).softmax(-1).sum(1).sum(1)


def _short(candidate: Candidate, block: Block) -> Tensor:
    """Small norms: such keys are attended to much (arXiv 2406.11430)."""
    return -block.key.float().norm(dim=-1).T


def _late(candidate: Candidate, block: Block) -> Tensor:
    """The last ones of the block."""
    b, ng = block.key.shape[:2]
    return torch.arange(b, dtype=torch.float32).repeat(ng, 1)


def _spread(candidate: Candidate, block: Block) -> Tensor:
    """1 for keys at even steps, 0 for the others."""
    b, ng = block.key.shape[:2]
    scores = torch.zeros(ng, b)
    num = min(candidate.passed, b - block.num_anchor)
    scores[:, torch.linspace(block.num_anchor, b - 1, num).round().long()] = 1.0
    return scores


SCORES = {"keydiff": _distinct, "scores": _attended, "norm": _short, "last": _late, "stride": _spread}
"""[ng, b], float32, by `Candidate.select`; higher is better."""
