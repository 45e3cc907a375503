"""Rules of tokens: what transformers' processors make of the same logits, alone or beside other rows."""

import random

import pytest
import torch
from megatron.core.inference.sampling_params import SamplingParams
from reference import sampled_token
from ruled_rows import NUM_WORDS, logits_by_transformers, logits_for_rules, random_mask, ruled_rows
from sampled_rows import VOCAB_SIZE, logits_of_all_kinds

from megatron_star.engine.answer_rules import AnswerRules
from megatron_star.engine.row_to_sample import RowToSample
from megatron_star.engine.sampling import sample_rows
from megatron_star.engine.token_rules import TokenRules

GREEDY = SamplingParams(top_k=1)


def test_tokens_are_drawn_from_what_transformers_processors_leave():
    ruled, logits = ruled_rows(240), logits_for_rules(240)
    choices = sample_rows(logits, [each.row for each in ruled])
    for each, row_logits, choice in zip(ruled, logits, choices, strict=True):
        left, s = logits_by_transformers(each, row_logits), each.row.sampling
        expected = sampled_token(
            left,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            random=each.row.random,
            forbidden=(),
        )
        assert choice.is_possible
        assert choice.token == expected, (s, each.row.rules.rules)


def test_a_row_with_rules_gets_the_same_choice_alone_and_beside_any_others():
    rows, logits = [each.row for each in ruled_rows(64, seed=1)], logits_for_rules(64)
    together = sample_rows(logits, rows)
    assert [sample_rows(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)] == together
    order = random.Random(1).sample(range(64), 41)
    assert sample_rows(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_penalties_count_the_tokens_that_came_since_the_step_before_and_no_proposal_twice():
    tokens: list[int] = []
    answer = AnswerRules(TokenRules(frequency_penalty=1.0), [[9]], tokens)
    logits = torch.tensor([[5.0, 4.5, 3.25, 0.0]])
    for _ in range(6):
        proposals = [0, 0]
        rows = [RowToSample(GREEDY, 0.0, rules=answer, proposed=proposals[:n]) for n in range(3)]
        choices = sample_rows(logits.expand(3, -1), rows)
        sample_rows(logits.expand(3, -1), rows)  # as where more candidates are looked at
        for choice, proposal in zip(choices, [*proposals, None], strict=True):
            tokens.append(choice.token)
            if choice.token != proposal:
                break
    expected = []
    while len(expected) < len(tokens):
        counts = torch.bincount(torch.tensor(expected, dtype=torch.int64), minlength=4)
        expected.append(int((logits[0] - counts).argmax()))
    assert tokens == expected


def test_log_probabilities_are_the_models_own_whatever_the_rules_say():
    rows, logits = [each.row for each in ruled_rows(60, seed=2)], logits_for_rules(60)
    expected = logits.double().log_softmax(-1)
    before = logits.clone()
    for i, choice in enumerate(sample_rows(logits, rows)):
        assert choice.logprob == pytest.approx(expected[i, choice.token].item(), abs=2e-6)
        order = sorted(range(VOCAB_SIZE), key=lambda token: (-logits[i, token].item(), token))
        assert [token for token, _ in choice.top] == order[: rows[i].num_top_logprobs]
        values = [expected[i, token].item() for token, _ in choice.top]
        assert [value for _, value in choice.top] == pytest.approx(values, abs=2e-6)
    assert torch.equal(logits, before)


def test_top_tokens_of_negative_and_zero_logits_come_by_value_and_then_by_id():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -7.5, 2.0, -1.0]])
    (choice,) = sample_rows(logits, [RowToSample(GREEDY, 0.0, num_top_logprobs=20)])
    assert [token for token, _ in choice.top] == [4, 1, 2, 0, 5, 3]


def test_a_row_of_which_rules_leave_no_token_says_so_and_changes_no_other():
    logits = logits_of_all_kinds(3)
    rows = [RowToSample(SamplingParams(top_p=0.9), 0.4)] * 3
    before = sample_rows(logits, rows)
    rows[1] = rows[1]._replace(mask=torch.zeros(NUM_WORDS, dtype=torch.int32))
    first, middle, last = sample_rows(logits, rows)
    assert [first, last] == [before[0], before[2]]
    assert (middle.is_finite, middle.is_possible) == (True, False)


def test_a_mask_that_ends_before_the_logits_do_allows_none_of_the_others():
    logits = torch.zeros(1, 70)
    mask = torch.tensor([0, 1 << 4], dtype=torch.int32)
    logits[0, 69] = 9.0
    (choice,) = sample_rows(logits, [RowToSample(GREEDY, 0.0, mask=mask)])
    assert choice.token == 36


def test_rules_leave_numbers_numbers_at_any_size_of_logits_and_penalty():
    logits = torch.tensor([[3e38, -3e38, 1.0, 2.0]])
    rules = TokenRules(repetition_penalty=0.01, frequency_penalty=2.0)
    answer = AnswerRules(rules, [[0, 1, 2]], [])
    sampling = SamplingParams(temperature=1.0)
    (choice,) = sample_rows(logits, [RowToSample(sampling, 0.5, rules=answer)])
    assert (choice.token, choice.is_possible) == (0, True)


@pytest.mark.parametrize("num_allowed", [3, 700])
def test_few_tokens_that_are_left_are_not_looked_for_twice(num_allowed, monkeypatch):
    """`top_k` keeps more than there are: all others are as unlikely as can be."""
    looked_at = []
    sorted_rows = torch.Tensor.sort
    monkeypatch.setattr(
        torch.Tensor,
        "sort",
        lambda rows, *a, **k: looked_at.append(rows.size(1)) or sorted_rows(rows, *a, **k),
    )
    answer = AnswerRules(TokenRules(allowed_tokens=tuple(range(num_allowed))), [[1]], [])
    sampling = SamplingParams(top_k=50)
    sample_rows(logits_of_all_kinds(5)[3:4], [RowToSample(sampling, 0.9, rules=answer)])
    assert max(looked_at) < VOCAB_SIZE


def test_a_prompt_of_a_million_tokens_is_looked_at_once():
    class Prompt(list):
        def __getitem__(self, index):
            looked_at.append(index)
            return super().__getitem__(index)

    looked_at: list = []
    answer = AnswerRules(
        TokenRules(repetition_penalty=1.2), [Prompt(range(100)) * 1, Prompt([5] * 70_000)], []
    )
    num_looks = len(looked_at)
    assert num_looks
    for _ in range(3):
        sample_rows(torch.randn(1, 100), [RowToSample(GREEDY, 0.0, rules=answer)])
    assert len(looked_at) == num_looks


def test_masks_of_several_rows_go_to_their_own_rows():
    logits = logits_of_all_kinds(6)
    masks = [random_mask(seed) if seed % 2 else None for seed in range(6)]
    rows = [RowToSample(GREEDY, 0.0, mask=mask) for mask in masks]
    for row_logits, mask, choice in zip(logits, masks, sample_rows(logits, rows), strict=True):
        if mask is not None:
            bits = torch.tensor([(int(mask[i // 32]) >> (i % 32)) & 1 for i in range(VOCAB_SIZE)])
            row_logits = row_logits.masked_fill(bits == 0, -torch.inf)
        assert choice.token == row_logits.argmax()


def test_a_bad_word_may_begin_in_the_prompt_in_the_answer_or_in_what_is_proposed():
    rules = TokenRules(bad_words=((1, 2, 3), (2, 4), (7,)))
    tokens: list[int] = []
    answer = AnswerRules(rules, [[0, 1], [2]], tokens)
    assert sorted(answer.forbidden([])) == [3, 4]
    assert answer.forbidden([5]) == []
    tokens += [5, 1]
    assert answer.forbidden([]) == []
    assert sorted(answer.forbidden([2])) == [3, 4]
