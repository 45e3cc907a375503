"""Several tokens a step: whatever is proposed, the answers are those without proposals."""

from collections import Counter

import pytest
from distributed import run_ranks
from speculation_ranks import drawn, quoted, tails_after_rejections, with_and_without


def assert_same_answers(expected, found):
    for one, other in zip(expected, found, strict=True):
        assert (other.tokens, other.text, other.finish_reason) == (one.tokens, one.text, one.finish_reason)
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def assert_same(checkpoint, world_size, *options):
    """With proposals that are right as far as they like to be: the same, in fewer steps."""
    expected, found, steps, fewer = run_ranks(world_size, with_and_without, str(checkpoint), *options)[0]
    assert_same_answers(expected, found)
    assert {result.finish_reason for result in expected} == {"stop", "length"}
    proposed = sum(result.num_proposed_tokens for result in found)
    accepted = sum(result.num_accepted_tokens for result in found)
    assert 100 < accepted < proposed - 100
    assert fewer < steps
    assert not any(result.num_proposed_tokens for result in expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_answers_are_those_without_proposals(checkpoints, world_size):
    assert_same(checkpoints("qwen3").megatron, world_size)


def test_so_they_are_with_slices_of_weights_and_compiled_layers(checkpoints):
    assert_same(checkpoints("qwen3").megatron, 2, True, [1, 4, 8])


@pytest.mark.parametrize(("name", "world_size"), [("gemma3_text", 1), ("gemma3_text", 2)])
def test_layers_with_windows_forget_what_was_rejected(converted, name, world_size):
    assert_same(converted(name).megatron, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_prompt_lookup_changes_no_answer_and_is_right_where_answers_quote(converted, world_size):
    checkpoint = converted("mistral_window").megatron
    expected, found, stats = run_ranks(world_size, quoted, str(checkpoint))[0]
    assert_same_answers(expected, found)
    accepted = sum(result.num_accepted_tokens for result in found)
    assert stats["accepted_tokens"] == accepted > 0
    assert stats["proposed_tokens"] == sum(result.num_proposed_tokens for result in found)


def test_tokens_beside_proposals_have_the_models_distribution(checkpoints):
    """Proposals are the likeliest tokens: a step that preferred them would draw them too often."""
    expected, seconds = run_ranks(1, drawn, str(checkpoints("qwen3").megatron), 1000, 5)[0]
    counts, total = Counter(seconds), len(seconds)
    assert set(counts) <= set(expected) and total > 150
    chi_square = sum((counts[token] - total * p) ** 2 / (total * p) for token, p in expected.items())
    assert chi_square < 23.5  # four degrees of freedom: one in ten thousand


def test_rejected_tokens_leave_no_kv_and_a_cancelled_request_nothing(checkpoints):
    plain, proposed = run_ranks(2, tails_after_rejections, str(checkpoints("qwen3").megatron))[0]
    assert proposed == plain
