"""Logits that are no numbers are told from those that are."""

import math

import pytest
import torch

from megatron_star.evaluation.comparison import mean_kl
from megatron_star.inference.finite import why_not_finite


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_one_of_many_is_enough(value, kind):
    logits = torch.zeros(1000)
    logits[777] = value
    assert f"({kind} for 1 of 1000 tokens)" in why_not_finite(logits, 0)


def test_the_largest_numbers_are_numbers():
    assert why_not_finite(torch.tensor([3.4e38, -3.4e38, 0.0]), 0) is None


def test_a_comparison_of_logits_with_nan_is_not_taken_for_equal():
    logits = torch.zeros(2, 5)
    assert mean_kl(logits, logits) == 0.0
    assert math.isnan(mean_kl(logits, torch.full((2, 5), float("nan"))))
