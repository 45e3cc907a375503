"""Logits that are no numbers are told from those that are."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_star.engine.finite import why_not_finite
from megatron_star.evaluation.comparison import mean_kl
from megatron_star.job.running import answer_batch


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
    exact = [[0, 1, 2, 3, 4]] * 2, [[-math.log(5)] * 5] * 2
    assert mean_kl(*exact, logits) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(mean_kl(*exact, torch.full((2, 5), float("nan"))))


def test_generate_and_evaluate_end_with_the_sentence_of_a_request_that_has_no_answer():
    ended = SimpleNamespace(is_set=lambda: True)
    answers = [
        SimpleNamespace(
            ended=ended,
            plan=SimpleNamespace(num_tokens=0),
            result=lambda error=error: SimpleNamespace(error=error),
        )
        for error in (None, "the logits of token 3 of the answer are not finite")
    ]
    engine = SimpleNamespace(enqueue=lambda answer: None)
    with pytest.raises(ValueError, match="1 of 2 requests have no answer: the logits of token 3"):
        answer_batch(engine, answers)
