"""One engine, many requests: the same answers as alone, bounded memory, one end for each."""

import json
from collections import Counter
from dataclasses import asdict
from datetime import timedelta

import engine_uses
import pytest
from distributed import run_ranks
from ranks import TIMEOUT, on_engine

from megatron_star.planning.pace import SMALLEST_WAVE_TOKENS
from megatron_star.planning.planner import MOST_LINKS


def use(checkpoints, world_size: int, what, **limits):
    """`what` of an engine on so many ranks, over the small qwen3 model."""
    _, megatron = checkpoints("qwen3")
    return run_ranks(world_size, on_engine, str(megatron), limits, what)[0]


def test_requests_asked_at_once_get_what_each_gets_alone_and_contexts_are_encoded_once(checkpoints):
    result = use(checkpoints, 2, engine_uses.together_and_one_by_one)
    assert result["together"] == result["alone"]
    assert result["encodings"] == 8


def test_a_context_is_encoded_ahead_answers_come_from_it_and_its_memory_is_given_back(checkpoints):
    found = use(checkpoints, 2, engine_uses.encoded_ahead)
    first, second, asked = found["results"]
    assert (first.tokens, first.finish_reason, found["streamed"]) == ([], "length", [])
    assert (first.num_query_tokens, first.cache_hit, second.cache_hit) == (0, False, True)
    assert first.num_context_tokens == found["held"] == asked.num_context_tokens
    assert (
        asked.cache_hit
        and asked.tokens == found["alone"].tokens
        and asked.logprobs == found["alone"].logprobs
    )
    assert found["stats"]["context_encodings"] == 3 and found["stats"]["cached_contexts"] == 1
    assert found["stats"]["kv_bytes_per_rank"] == found["left"]


@pytest.mark.parametrize(("world_size", "budget_tokens"), [(1, 650), (2, 550)])
def test_answers_do_not_depend_on_who_shares_a_context_waits_or_is_cancelled(
    checkpoints, world_size, budget_tokens
):
    limits = {"max_running": 4, "budget_bytes_per_rank": budget_tokens * 768}
    result = use(checkpoints, world_size, engine_uses.in_each_others_way, **limits)
    assert len(result["together"]) > 30
    assert result["together"] == result["alone"]


def test_a_request_that_waited_is_encoded_by_its_own_plan(checkpoints):
    _, megatron = checkpoints("qwen3")
    limits = {"budget_bytes_per_rank": 1000 * 768}
    uses = engine_uses.one_gives_up_while_the_other_waits
    (tokens,) = run_ranks(1, on_engine, str(megatron), limits, uses, TIMEOUT, False)
    for together, alone in tokens.values():
        assert together == alone


def test_logits_that_are_no_numbers_end_their_requests_by_name_and_the_engine_goes_on(checkpoints):
    result = use(checkpoints, 1, engine_uses.damaged_for_a_while)
    for kind in ("NaN", "infinite"):
        for answer in result[kind]:
            assert (answer.finish_reason, answer.tokens, answer.text) == ("error", [], "")
            assert "the logits of token 1 of the answer are not finite" in answer.error
            json.dumps(asdict(answer), allow_nan=False)
    assert result["repaired"][0].finish_reason == "length" and result["repaired"][0].error is None
    assert result["running"] == 0


def test_a_submitted_request_is_what_it_was_whatever_its_caller_does_with_the_lists(checkpoints):
    _, megatron = checkpoints("qwen3")
    uses = engine_uses.the_callers_list_changes
    ((changed, untouched),) = run_ranks(1, on_engine, str(megatron), {}, uses, TIMEOUT, False)
    assert changed == untouched


def test_a_stream_gives_the_text_and_never_a_piece_of_a_stop_string(checkpoints):
    result = use(checkpoints, 2, engine_uses.streamed)
    assert "".join(result["pieces"]) == result["text"]
    assert result["stop"] not in result["text"] and len(result["pieces"]) == 12


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_thousand_random_requests_end_once_each_and_leave_nothing(checkpoints, world_size):
    result = use(checkpoints, world_size, engine_uses.soak_1000, budget_bytes_per_rank=2_000_000)
    assert len(result["reasons"]) == 1000
    assert set(result["reasons"]) <= {"stop", "length", "cancelled", "deadline"}
    assert min(Counter(result["reasons"])[reason] for reason in ("stop", "length", "cancelled")) > 20
    assert result["left"]["running"] == result["left"]["waiting"] == 0
    assert sum(result["left"]["kv_bytes_per_rank"]) == result["cached_bytes"]
    assert max(result["left"]["kv_bytes_per_rank"]) <= 2_000_000
    assert result["memory_kb"][-1] - result["memory_kb"][2] < 40_000


def test_a_pause_longer_than_the_groups_timeout_harms_nothing(checkpoints):
    _, megatron = checkpoints("qwen3")
    timeout = timedelta(seconds=5)
    ended, _ = run_ranks(2, on_engine, str(megatron), {}, engine_uses.after_idling, timeout)
    assert ended in ("length", "stop")


def test_a_running_sequence_has_a_token_beside_each_wave_and_waves_are_cut_to_the_longest_wait(checkpoints):
    """No machine is as fast as this wait asks for, so waves are as short as they may be."""
    result = use(checkpoints, 2, engine_uses.beside_a_long_context, max_wait_seconds=1e-6)
    assert result["longest_segment"] <= SMALLEST_WAVE_TOKENS
    assert result["tokens"] >= result["waves"]


def test_what_never_fits_is_refused_with_numbers_and_what_does_not_fit_now_waits(checkpoints):
    result = use(checkpoints, 2, engine_uses.too_large_and_waiting, budget_bytes_per_rank=1_000_000)
    assert "8000 context tokens" in result["message"]
    assert "bytes of KV on a rank, but the budget is 1,000,000 bytes a rank" in result["message"]
    assert set(result["reasons"]) <= {"length", "stop"}
    assert result["cached"] < 6


@pytest.mark.parametrize("world_size", [1, 2])
def test_histories_that_grow_are_encoded_once_without_a_word_of_turns_and_answered_as_if_alone(
    checkpoints, world_size
):
    found = use(checkpoints, world_size, engine_uses.growing_histories)
    for result in found.values():
        assert result["cached_alone"] == 0 and result["tokens"][0] == result["tokens"][1]
        for one, other in zip(*result["logprobs"], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        assert result["links"] <= MOST_LINKS
    exact = found["exact"]
    first, other, *later = exact["cached"]
    assert (first, other) == (0, 400)
    assert exact["links"] == MOST_LINKS  # so that some are encoded again, as one
    assert sum(later) > 0.9 * sum(exact["lengths"][2:])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_growing_context_encodes_only_what_is_new_and_answers_as_if_nothing_was_cached(
    checkpoints, world_size
):
    star, exact = use(checkpoints, world_size, engine_uses.turns)
    for result in (star, exact):
        assert result["cached"] == [0, 350, 600]
        assert result["alone_cached"] == 0
        assert result["growing"] == result["alone"]
    assert exact["growing"] == exact["whole"]
    assert star["blocks"] == 4 + 3 + 3
