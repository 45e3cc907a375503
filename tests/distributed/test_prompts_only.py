"""Requests that generate nothing: contexts encoded ahead, and log-probabilities of prompts."""

import prompt_uses
import pytest
from distributed import run_ranks
from ranks import on_engine


def use(checkpoints, world_size: int, what, **limits):
    """`what` of an engine on so many ranks, over the small qwen3 model."""
    _, megatron = checkpoints("qwen3")
    return run_ranks(world_size, on_engine, str(megatron), limits, what)[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_context_is_encoded_ahead_without_a_query_and_found_by_its_first_question(checkpoints, world_size):
    result = use(checkpoints, world_size, prompt_uses.encoded_ahead)
    first, _, nothing, asked = result["results"]
    assert [r.finish_reason for r in result["results"]] == ["length"] * 4
    assert [r.cache_hit for r in result["results"]] == [False, True, False, True]
    assert (first.tokens, first.text, nothing.num_context_tokens) == ([], "", 0)
    assert len(asked.tokens) == 5
    assert (result["running"], result["encodings"]) == (0, 1)
