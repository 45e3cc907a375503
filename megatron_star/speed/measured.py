"""Choices that depend on the processor: measured when a model is loaded, the same on all ranks.

What is chosen from gives the same results but for rounding. A machine is seldom quiet, so candidates are run
in turn and the least time of each counts; and the first one stays unless another is clearly faster.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from time import perf_counter

import torch

from megatron_star.parallel.exchange import Exchange

ROUNDS = 5
CLEARLY_FASTER = 0.9
"""Of the first candidate's time, what another may take at most to be chosen instead."""


def least_seconds(actions: Mapping[Hashable, Callable[[], object]]) -> dict[Hashable, float]:
    """Of each action, run in turn; the first round is not counted."""
    seconds: dict[Hashable, float] = {}
    for number in range(1 + ROUNDS):
        for name, action in actions.items():
            start = perf_counter()
            action()
            taken = perf_counter() - start
            if number:
                seconds[name] = min(taken, seconds.get(name, taken))
    return seconds


def agreed(seconds: Mapping[Hashable, float], exchanges: Iterable[Exchange]) -> dict[Hashable, float]:
    """The longest of any rank, by name; these are the same on all ranks of the exchanges, which call this."""
    longest = list(seconds.values())
    for exchange in exchanges:
        longest = exchange.slowest(torch.tensor(longest, dtype=torch.float64))
    return dict(zip(seconds, longest, strict=True))


def fastest(seconds: Mapping[str, float]) -> str:
    """Of these candidates, of which the first is preferred."""
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= CLEARLY_FASTER * seconds[first] else first
