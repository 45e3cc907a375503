"""How far a mean or a share of a few samples can be trusted."""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

import torch

CONFIDENCE = 0.95
RESAMPLES = 2000


def wilson_interval(mean: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The Wilson score interval of the mean of `count` scores in [0, 1].

    It is made for scores that are 0 or 1. No other scores in [0, 1] with the same mean vary more, so that
    for fractions it is, if anything, too wide.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    shrunk = 1 + z * z / count
    center = (mean + z * z / (2 * count)) / shrunk
    half = z / shrunk * sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
    return max(0.0, center - half), min(1.0, center + half)


def share_upper_bound(hits: int, count: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided Clopper-Pearson bound: with this confidence the true share is not above it.

    It holds exactly, for any count; 1 if nothing was observed.
    """
    low, high = (hits / count if count else 1.0), 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _at_most(hits, count, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def most_hits(count: int, share: float, confidence: float = CONFIDENCE) -> int:
    """The most hits among `count` whose `share_upper_bound` is not above `share`; -1 if there is none."""
    hits = -1
    while hits + 1 < count and _at_most(hits + 1, count, share) <= 1 - confidence:
        hits += 1
    return hits


def samples_needed(share: float, confidence: float = CONFIDENCE) -> int:
    """How many samples without a single hit it takes until `share_upper_bound` is not above `share`."""
    count = 1
    while share_upper_bound(0, count, confidence) > share:
        count *= 2
    return next(n for n in range(count // 2 + 1, count + 1) if share_upper_bound(0, n, confidence) <= share)


def _at_most(hits: int, count: int, share: float) -> float:
    """The probability of at most so many hits."""
    return sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits + 1))


def bootstrap_ratio(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the ratio of two means of means, over samples that belong together.

    Args:
        numerators, denominators: by cell, the scores of the same samples in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    above, below = torch.zeros(RESAMPLES), torch.zeros(RESAMPLES)
    for top, bottom in zip(numerators, denominators, strict=True):
        drawn = torch.randint(len(top), (RESAMPLES, len(top)), generator=generator)
        above += torch.tensor(top)[drawn].mean(1)
        below += torch.tensor(bottom)[drawn].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = (above / below).nan_to_num(posinf=1.0).quantile(torch.tensor([tail, 1 - tail])).tolist()
    return low, high
