"""Tokens of a whole step: those of the sorted vocabulary, whatever is beside them, and a faithful draw."""

import random
from collections import Counter

import pytest
import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from megatron.core.inference.sampling_params import SamplingParams
from reference import sampled_token
from sampled_rows import VOCAB_SIZE, logits_of_all_kinds, rows_of_all_kinds

from megatron_star.engine.sampling import RowToSample, sample_rows, uniform

KINDS = {
    "greedy": {"top_k": 1},
    "temperature 0": {"temperature": 0.0},
    "temperature": {"temperature": 1.4},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "both, sharper": {"top_k": 6, "top_p": 0.8, "temperature": 0.8},
    "top_p of 1": {"top_p": 1.0},
}


def test_the_tokens_are_those_of_the_sorted_vocabulary_ties_included():
    rows, logits = rows_of_all_kinds(100), logits_of_all_kinds(100)
    for row, row_logits, choice in zip(rows, logits, sample_rows(logits, rows), strict=True):
        s = row.sampling
        expected = sampled_token(
            row_logits,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            random=row.random,
            forbidden=row.forbidden,
        )
        assert choice.token == expected, s


def test_a_row_gets_the_same_choice_alone_and_beside_any_others():
    rows, logits = rows_of_all_kinds(64), logits_of_all_kinds(64)
    together = sample_rows(logits, rows)
    assert [sample_rows(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)] == together
    order = random.Random(1).sample(range(64), 41)
    assert sample_rows(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_a_step_that_samples_nothing_gives_nothing():
    assert sample_rows(torch.empty(0, VOCAB_SIZE), []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_distribution_of_megatrons_sampling(kind):
    sampling, num_draws = SamplingParams(**KINDS[kind]), 20_000
    torch.manual_seed(1)
    logits = torch.randn(12) * 1.2
    rows = [RowToSample(sampling, uniform(7, i)) for i in range(num_draws)]
    counts = Counter(choice.token for choice in sample_rows(logits.expand(num_draws, -1), rows))
    expected = num_draws * megatrons_probabilities(logits, sampling)
    assert set(counts) <= set(expected.nonzero()[:, 0].tolist())
    kept = [i for i in range(12) if expected[i] > 0]
    chi_square = sum((counts[i] - expected[i].item()) ** 2 / expected[i].item() for i in kept)
    assert chance_of_more(chi_square, len(kept) - 1) > 1e-3


def megatrons_probabilities(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """What its sampling draws from: one filter at a time, top_p of what top_k leaves."""
    greedy = sampling.temperature == 0.0 or sampling.top_k == 1
    kept = TorchSampling.filter_logits(
        logits[None], 1.0 if greedy else sampling.temperature, 1 if greedy else sampling.top_k, 0.0
    )
    if not greedy:
        kept = TorchSampling.filter_logits(kept, 1.0, 0, sampling.top_p)
    return kept[0].double().softmax(-1)


def chance_of_more(chi_square: float, degrees: int) -> float:
    """That a draw of this distribution is further from what is expected."""
    if not degrees:
        return float(chi_square == 0.0)
    return torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(chi_square / 2.0)).item()


def test_random_numbers_are_even_over_places_and_over_seeds_and_independent_of_the_one_before():
    for numbers in (
        [uniform(-5, i) for i in range(20_000)],
        [uniform(i, 3) for i in range(20_000)],
        [uniform(2**62, i) for i in range(20_000)],
    ):
        assert min(numbers) >= 0.0 and max(numbers) < 1.0
        pairs = Counter((int(8 * a), int(8 * b)) for a, b in zip(numbers, numbers[1:], strict=False))
        expected = (len(numbers) - 1) / 64
        chi_square = sum((pairs[a, b] - expected) ** 2 / expected for a in range(8) for b in range(8))
        assert chance_of_more(chi_square, 63) > 1e-3
    assert uniform(1, 23) != uniform(12, 3)


def test_log_probabilities_are_the_models_own_whatever_is_forbidden_or_filtered():
    rows = [row._replace(num_top_logprobs=1) for row in rows_of_all_kinds(40, seed=3)]
    logits = logits_of_all_kinds(40)
    expected = logits.double().log_softmax(-1)
    for i, choice in enumerate(sample_rows(logits, rows)):
        assert choice.token not in rows[i].forbidden
        assert choice.logprob == pytest.approx(expected[i, choice.token].item(), abs=2e-6)
        likeliest, its_logprob = choice.top[0]
        assert likeliest == logits[i].argmax()
        assert its_logprob == pytest.approx(expected[i].max().item(), abs=2e-6)
        assert choice.is_finite


def test_a_forbidden_likeliest_token_is_named_but_not_chosen():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    rows = [
        RowToSample(SamplingParams(top_k=1), 0.5, (1,), num_top_logprobs=1),
        RowToSample(SamplingParams(top_k=2), 0.0, (1, 1), num_top_logprobs=1),
    ]
    assert [(c.token, c.top[0][0]) for c in sample_rows(logits, rows)] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_says_so_and_changes_no_other(kind, broken):
    logits = logits_of_all_kinds(3)
    rows = [RowToSample(SamplingParams(**KINDS[kind]), 0.4)] * 3
    before = sample_rows(logits, rows)
    logits[1, 17] = broken
    first, middle, last = sample_rows(logits, rows)
    assert [first, last] == [before[0], before[2]]
    assert not middle.is_finite
    assert 0 <= middle.token < VOCAB_SIZE


@pytest.mark.parametrize(
    ("temperature", "tokens"), [(1e-300, [4, 4, 5, 5]), (1e-3, [4, 4, 5, 5]), (1e300, [1, 2, 4, 5])]
)
def test_any_temperature_draws_from_what_is_allowed(temperature, tokens):
    logits = torch.tensor([[-3.4e38, 1.0, 2.0, 9.0, 3.0, 3.0]])
    sampling = SamplingParams(temperature=temperature)
    rows = [RowToSample(sampling, number, (3,)) for number in (0.0, 0.3, 0.7, 1 - 2**-53)]
    assert [choice.token for choice in sample_rows(logits.expand(4, -1), rows)] == tokens
