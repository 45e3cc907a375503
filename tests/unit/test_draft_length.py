"""How many tokens are proposed: by what is likely to be kept, and what rows cost."""

import itertools

import pytest

from megatron_star.engine.draft_length import MOST_AGE, Acceptance, StepSeconds, draft_lengths
from megatron_star.engine.proposer import Guess


def _steps(seconds):
    """Steps of 1 to 80 rows that take so long."""
    steps = StepSeconds()
    for _ in range(2):
        for rows in range(1, 81):
            steps.note(rows, seconds(rows))
    return steps


def _rate(lengths, chances, num_rows, steps):
    tokens = num_rows + sum(c**n for c, k in zip(chances, lengths, strict=True) for n in range(1, k + 1))
    return tokens / steps.expected(num_rows + sum(lengths))


@pytest.mark.parametrize("chances", [(0.9, 0.2), (0.5, 0.5), (0.99, 0.7), (0.05, 0.1)])
@pytest.mark.parametrize("slope", [0.0, 0.05, 0.3, 1.0])
def test_lengths_are_those_of_most_tokens_a_second(chances, slope):
    steps = _steps(lambda rows: 1 + slope * (rows - 2))
    lengths = draft_lengths(chances, [5, 4], 2, steps)
    best = max(_rate(k, chances, 2, steps) for k in itertools.product(range(6), range(5)))
    assert _rate(lengths, chances, 2, steps) >= best / 1.02


def test_nothing_is_proposed_where_rows_cost_as_much_as_steps():
    assert draft_lengths([0.9], [16], 1, _steps(lambda rows: float(rows))) == [0]


def test_cheaper_wide_steps_do_not_make_more_than_can_be_proposed():
    assert draft_lengths([0.9, 0.9], [2, 1], 2, _steps(lambda rows: 1 / rows)) == [2, 1]


def test_rows_that_were_never_measured_are_tried_and_known_afterwards():
    steps = StepSeconds()
    steps.note(1, 1.0)
    assert not steps.knows(1)
    steps.note(1, 1.0)
    assert steps.knows(1)
    (wide,) = draft_lengths([0.8], [16], 1, steps)
    assert wide > 4
    for _ in range(2):
        steps.note(1 + wide, 50.0)
    (narrow,) = draft_lengths([0.8], [16], 1, steps)
    assert narrow < wide


def test_what_was_measured_long_ago_is_measured_anew():
    steps = _steps(lambda rows: 1.0)
    for _ in range(MOST_AGE):
        steps.note(20, 1.0)
    assert steps.knows(20) and not steps.knows(1)


def test_acceptance_is_learned_for_each_kind_and_forgets():
    acceptance = Acceptance()
    often, rarely = Guess([1, 2, 3], 0, 0.5), Guess([1, 2, 3], 1, 0.5)
    assert acceptance.chance(often) == 0.5
    for _ in range(20):
        assert acceptance.note(often, [1, 2, 3, 4]) == 3
        assert acceptance.note(rarely, [7]) == 0
    assert acceptance.chance(often) > 0.9 and acceptance.chance(rarely) < 0.1
    for _ in range(20):
        acceptance.note(rarely, [1, 2, 3])
    assert acceptance.chance(rarely) > 0.8
    assert acceptance.note(often, []) == 0
