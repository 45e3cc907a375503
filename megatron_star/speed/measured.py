"""Choices that depend on the processor: measured when a model is loaded, the same on all ranks.

What is chosen from gives the same results but for rounding. A machine is seldom quiet, so candidates are run
in turn and the least time of each counts; and the first one stays unless another is clearly faster.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from time import perf_counter

import torch

from megatron_star.parallel.exchange import Exchange

ROUNDS = 4
MOST_SECONDS = 0.05
"""Of the rounds of one choice but the first two."""
CLEARLY_FASTER = 0.9
"""Of the first candidate's time, what another may take at most to be chosen instead."""
LEAST_SAVED_SECONDS = 3e-5
"""That another one must save: small models, whose times are all noise, are run in one way always."""


def least_seconds(actions: Mapping[Hashable, Callable[[], object]]) -> dict[Hashable, float]:
    """Of each action, run in turn; the first round is not counted, and slow ones have fewer."""
    seconds: dict[Hashable, float] = {}
    begin = perf_counter()
    for number in range(1 + ROUNDS):
        if number > 1 and perf_counter() - begin > MOST_SECONDS:
            break
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


def fastest[Name: Hashable](seconds: Mapping[Name, float]) -> Name:
    """Of these candidates, of which the first is preferred."""
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    enough = min(CLEARLY_FASTER * seconds[first], seconds[first] - LEAST_SAVED_SECONDS)
    return best if seconds[best] <= enough else first
