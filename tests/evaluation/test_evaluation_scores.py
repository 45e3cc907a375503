"""Scores, and how far they can be trusted: against hand-made cases and simulations."""

import random
from statistics import fmean

import pytest

from megatron_star.evaluation.fitting import largest_fitting
from megatron_star.evaluation.scoring import match_all, match_any
from megatron_star.evaluation.statistics import (
    bootstrap_ratio,
    samples_needed,
    share_upper_bound,
    wilson_interval,
)


def test_the_share_of_references_in_an_answer_counts_in_whatever_case():
    assert match_all("they are abc and DEF.", ["ABC", "def", "ghi", "jkl"]) == 0.5
    assert match_all("nothing", ["ABC"]) == 0.0


def test_one_of_several_accepted_answers_is_enough():
    assert match_any("In PARIS, I think", ["paris", "the city of Paris"]) == 1.0
    assert match_any("In Rome", ["paris"]) == 0.0


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    # Of Brown, Cai and DasGupta's formula, worked out by hand with z = 1.959964.
    [(0.5, 100, 0.40383, 0.59617), (1.0, 20, 0.83887, 1.0), (0.0, 20, 0.0, 0.16113)],
)
def test_the_wilson_interval_is_the_published_one(mean, count, low, high):
    assert wilson_interval(mean, count) == pytest.approx((low, high), abs=1e-5)


def test_the_wilson_interval_covers_a_mean_of_fractions_at_least_as_often_as_it_says():
    generator = random.Random(0)
    misses = 0
    for _ in range(1000):
        scores = [generator.choice([0.5, 0.75, 1.0]) for _ in range(30)]
        low, high = wilson_interval(fmean(scores), len(scores))
        misses += not low <= 0.75 <= high
    assert misses <= 50


def test_the_upper_bound_of_no_hits_is_known_in_closed_form():
    for count in (1, 5, 59, 200):
        assert share_upper_bound(0, count) == pytest.approx(1 - 0.05 ** (1 / count), abs=1e-6)


def test_the_upper_bound_of_some_hits_is_clopper_and_pearsons():
    assert share_upper_bound(2, 10) == pytest.approx(0.50690, abs=1e-4)  # their table, one-sided 95%
    assert share_upper_bound(10, 10) == 1.0
    assert share_upper_bound(0, 0) == 1.0


def test_the_upper_bound_is_too_low_in_at_most_one_case_of_twenty():
    generator = random.Random(0)
    bounds = {hits: share_upper_bound(hits, 40) for hits in range(41)}
    below = sum(bounds[sum(generator.random() < 0.1 for _ in range(40))] < 0.1 for _ in range(2000))
    assert below <= 120


@pytest.mark.parametrize(("share", "count"), [(0.05, 59), (0.02, 149), (0.5, 5)])
def test_as_many_samples_are_needed_as_make_the_bound_small_enough(share, count):
    assert samples_needed(share) == count
    assert share_upper_bound(0, count) <= share < share_upper_bound(0, count - 1)


def test_the_bootstrap_pairs_samples_so_that_equal_scores_have_a_ratio_of_one():
    scores = [[0.0, 1.0, 1.0, 0.0], [0.5, 1.0, 1.0, 1.0]]
    assert bootstrap_ratio(scores, scores) == (1.0, 1.0)


def test_the_bootstrap_contains_the_ratio_and_narrows_with_more_samples():
    few, many = (([[1.0, 0.0] * n], [[1.0] * 2 * n]) for n in (5, 100))
    widths = []
    for top, bottom in (few, many):
        low, high = bootstrap_ratio(top, bottom)
        assert low < 0.5 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize("per_unit", [0.3, 1.0, 7.5])
@pytest.mark.parametrize("base", [0, 100])
def test_the_largest_size_that_fits_is_found_with_few_tries(per_unit, base):
    tried = []

    def num_tokens(size: int) -> int:
        tried.append(size)
        return base + int(size * per_unit)

    size = largest_fitting(num_tokens, 100_000, smallest=0)
    assert base + int(size * per_unit) <= 100_000 < base + int((size + 1) * per_unit)
    assert len(tried) <= 12


def test_a_bound_on_the_size_is_kept():
    assert largest_fitting(lambda size: size, 100, smallest=1, largest=7) == 7


def test_a_size_that_is_too_small_to_fit_is_refused():
    with pytest.raises(ValueError, match="10 tokens are too few: at least 15 are needed"):
        largest_fitting(lambda size: 5 * size, 10, smallest=3)
