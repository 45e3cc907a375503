"""Batches, sampling, ends and log-probabilities of generation, on real ranks."""

from dataclasses import replace

import pytest
from distributed import RankError, run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from models import VOCAB_SIZE, dense_logits, random_tokens
from ranks import generate, output_layer_calls

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest
from megatron_star.planning.sizes import sizes_of, with_sizes

GREEDY = {"top_k": 1}
STAR = StarConfig(block_size=16)


def request(
    num_context: int = 60, num_query: int = 5, *, seed: int = 0, tokens: int = 8, star=STAR, **sampling
):
    """A request with random tokens and these sampling parameters."""
    return StarRequest(
        context_tokens=random_tokens(num_context, seed=num_context),
        query_tokens=random_tokens(num_query, seed=num_query + 1000),
        star=star,
        sampling=SamplingParams(num_tokens_to_generate=tokens, **sampling),
        seed=seed,
    )


def answers(checkpoints, world_size: int, *batches, tp_size: int = 1, decode_weights: str = "whole"):
    """The driver's results, batch by batch."""
    _, megatron = checkpoints("qwen3")
    return run_ranks(world_size, generate, str(megatron), tp_size, batches, decode_weights)[0]


@pytest.mark.parametrize(("mode", "num_context", "num_query"), [("star", 60, 5), ("exact", 160, 3)])
def test_greedy_tokens_and_logprobs_are_the_dense_models(checkpoints, mode, num_context, num_query):
    """The second one's tail has room for 10 tokens behind its context, and moves out after that."""
    hf, _ = checkpoints("qwen3")
    asked = request(num_context, num_query, star=replace(STAR, mode=mode), tokens=12, **GREEDY)
    ((result,),) = answers(checkpoints, 2, [asked])

    tokens = asked.context_tokens + asked.query_tokens
    for token, logprob in zip(result.tokens, result.logprobs, strict=True):
        expected = dense_logits(hf, tokens, len(asked.context_tokens), asked.star)[-1].log_softmax(-1)
        assert token == expected.argmax().item()
        assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
        tokens.append(token)


MIXED = [
    request(60, 5, **GREEDY),
    request(33, 1, star=StarConfig(mode="exact"), **GREEDY),
    request(0, 9, tokens=3, **GREEDY),
    request(60, 7, tokens=11, **GREEDY),
    request(100, 4, star=StarConfig(block_size=30, neighbor_blocks=1), tokens=1, **GREEDY),
    request(80, 2, temperature=0.8, top_p=0.9, seed=3),
    request(80, 3, temperature=1.5, top_k=20, seed=4),
]


@pytest.mark.parametrize(("world_size", "tp_size"), [(1, 1), (3, 1), (4, 2)])
def test_a_batch_of_different_requests_gives_what_each_gives_alone(checkpoints, world_size, tp_size):
    together, *alone = answers(checkpoints, world_size, MIXED, *([r] for r in MIXED), tp_size=tp_size)
    for in_batch, (by_itself,) in zip(together, alone, strict=True):
        assert in_batch.tokens == by_itself.tokens
        assert in_batch.logprobs == pytest.approx(by_itself.logprobs, abs=1e-4)


@pytest.mark.parametrize("decode_weights", ["sliced", "auto"])
def test_slices_of_the_weights_generate_the_same_tokens(checkpoints, decode_weights):
    (whole,) = answers(checkpoints, 3, MIXED)
    (sliced,) = answers(checkpoints, 3, MIXED, decode_weights=decode_weights)
    assert [r.tokens for r in sliced] == [r.tokens for r in whole]


def test_requests_with_the_same_context_share_its_encoding(checkpoints):
    shared = [request(60, n, **GREEDY) for n in (3, 4, 5)]
    together, *alone = answers(checkpoints, 2, shared, *([r] for r in shared))
    assert [r.tokens for r in together] == [r.tokens for (r,) in alone]
    assert [r.cache_hit for r in together] == [False, True, True]


def test_a_seed_decides_what_is_sampled(checkpoints):
    batch = [request(temperature=2.0, seed=seed, tokens=10) for seed in (1, 1, 2)]
    (results,) = answers(checkpoints, 2, batch)
    assert results[0].tokens == results[1].tokens != results[2].tokens


def test_temperature_zero_is_greedy(checkpoints):
    ((zero, greedy),) = answers(checkpoints, 2, [request(temperature=0.0), request(**GREEDY)])
    assert zero.tokens == greedy.tokens


def test_top_k_samples_only_among_the_k_most_likely(checkpoints):
    hf, _ = checkpoints("qwen3")
    asked = request(tokens=1, temperature=5.0, top_k=3)
    (results,) = answers(checkpoints, 2, [replace(asked, seed=seed) for seed in range(40)])
    logits = dense_logits(hf, asked.context_tokens + asked.query_tokens, 60, STAR)[-1]
    assert {r.tokens[0] for r in results} == set(logits.topk(3).indices.tolist())


def test_generation_stops_at_the_end_token_and_keeps_it(checkpoints):
    ((full,),) = answers(checkpoints, 2, [request(tokens=8, **GREEDY)])
    end = full.tokens[4]
    first = full.tokens.index(end)
    ((result,),) = answers(checkpoints, 2, [request(tokens=8, termination_id=end, **GREEDY)])
    assert result.tokens == full.tokens[: first + 1]
    assert (result.finish_reason, full.finish_reason) == ("stop", "length")


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(checkpoints):
    ((full,),) = answers(checkpoints, 2, [request(tokens=8, **GREEDY)])
    third, fourth = full.tokens[2:4]
    stop = f" {third} {fourth} "
    ((result,),) = answers(checkpoints, 2, [request(tokens=8, stop_words=["nowhere", stop], **GREEDY)])
    assert result.text == full.text[: full.text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.tokens == full.tokens[: len(result.tokens)] and len(result.tokens) < 8


def test_auto_is_exact_for_one_block_and_star_for_many(checkpoints):
    few, many = (StarConfig(mode="auto", block_size=size) for size in (1000, 8))
    ((short, long),) = answers(checkpoints, 2, [request(star=few, **GREEDY), request(star=many, **GREEDY)])
    assert (short.mode, short.num_blocks) == ("exact", 1)
    assert (long.mode, long.num_blocks) == ("star", 8)


def test_a_result_says_what_was_used(checkpoints):
    ((result,),) = answers(checkpoints, 2, [request(60, 5, **GREEDY)])
    assert (result.num_context_tokens, result.num_query_tokens, result.num_blocks) == (60, 5, 4)
    assert result.sizes == sizes_of(with_sizes(STAR, 60)) and result.sizes["block_size"] == STAR.block_size
    timings = result.timings
    assert timings.ttft_s == timings.context_encoding_s + timings.query_s > 0
    assert timings.tpot_s > 0
    bytes_per_token = 2 * 3 * 2 * 16 * 4  # key and value, layers, KV heads, head size, float32
    # With room for 3 behind the 30 of each rank, and for 256 of the tail.
    assert sum(result.kv_bytes_per_rank) == bytes_per_token * (60 + 2 * 3 + 256)


BAD = {
    "the query is empty": request(60, 0),
    "temperature is -1": request(temperature=-1.0),
    "temperature is nan": request(temperature=float("nan")),
    f"top_k is {VOCAB_SIZE}": request(top_k=VOCAB_SIZE),
    "top_p is 1.5": request(top_p=1.5),
    "min_tokens is 9: it must be from 0 to the 6": replace(request(tokens=6), min_tokens=9),
    "num_tokens_to_generate is -1": request(tokens=-1),
    "model's limit is 8192": request(8190, 5),
    "token id 9999": replace(request(), context_tokens=[9999]),
    "token id -1": replace(request(), query_tokens=[-1]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_request_that_cannot_be_answered_is_refused_before_anything_runs(checkpoints, message):
    with pytest.raises(ValueError, match=message):
        BAD[message].check(vocab_size=VOCAB_SIZE, max_sequence_length=8192)


def test_a_rank_that_raises_ends_the_test_with_its_traceback(checkpoints):
    with pytest.raises(RankError, match="the query is empty"):
        answers(checkpoints, 2, [BAD["the query is empty"]])


def test_logits_are_made_for_the_last_query_token_only(checkpoints):
    _, megatron = checkpoints("qwen3")
    for calls in run_ranks(2, output_layer_calls, str(megatron), random_tokens(50), STAR):
        assert calls == [0, 1]
