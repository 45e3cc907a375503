"""Requests that generate nothing: contexts encoded ahead, and log-probabilities of prompts."""

import prompt_uses
import pytest
import scored_ranks
from distributed import run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from models import dense_logits, random_tokens
from prompt_uses import FEW_TOKENS
from ranks import on_engine

from megatron_star.config import StarConfig
from megatron_star.engine.prompt_scores import TokenScore
from megatron_star.engine.request import StarRequest


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


EXACT = StarConfig(mode="exact", wave_tokens=70)
STAR = StarConfig(block_size=24, anchor="recompute", wave_tokens=40)
BESIDE = StarRequest(
    context_tokens=random_tokens(90, seed=90), query_tokens=random_tokens(4, seed=1), sampling=FEW_TOKENS
)


def prompt(num_context: int, num_query: int, star: StarConfig, num_top: int, tokens: int = 0) -> StarRequest:
    return StarRequest(
        context_tokens=random_tokens(num_context, seed=num_context),
        query_tokens=random_tokens(num_query, seed=num_query + 1000),
        star=star,
        sampling=SamplingParams(num_tokens_to_generate=tokens, top_k=1),
        prompt_logprobs=num_top,
    )


PROMPTS = [
    prompt(151, 9, EXACT, 3),
    prompt(151, 9, EXACT, 0, tokens=4),
    prompt(97, 0, EXACT, 2),
    prompt(0, 300, EXACT, 1),
    prompt(0, 1, EXACT, 1, tokens=2),
    prompt(100, 140, STAR, 20, tokens=1),
    prompt(1, 1, STAR, 1),
]


def test_what_ranks_pass_each_other_does_not_change_how_likely_a_prompt_is(checkpoints):
    """With keys that blocks pass on, in blocks and segments of many sizes."""
    _, megatron = checkpoints("qwen3")
    asked = [prompt(400, 9, StarConfig(block_size=60, passed_keys=16, anchor_size=8), 2)]
    (_, one), *_ = run_ranks(1, scored_ranks.scored, str(megatron), 1, asked)[0]
    (_, three), *_ = run_ranks(3, scored_ranks.scored, str(megatron), 1, asked)[0]
    assert one[0] is None and three[0] is None
    assert [s.logprob for s in one[1:]] == pytest.approx([s.logprob for s in three[1:]], abs=1e-4)


@pytest.mark.parametrize(("world_size", "tp_size"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_every_token_of_a_prompt_is_as_likely_as_in_the_dense_model(checkpoints, world_size, tp_size):
    hf, megatron = checkpoints("qwen3")
    asked = [*PROMPTS[:3], BESIDE, *PROMPTS[3:], BESIDE]
    found = run_ranks(world_size, scored_ranks.scored, str(megatron), tp_size, asked)[0]
    assert [scores is None for _, scores in found] == [r.prompt_logprobs is None for r in asked]
    for request, (result, scores) in zip(asked, found, strict=True):
        assert (result.finish_reason, result.error) == ("length", None)
        assert len(result.tokens) == request.sampling.num_tokens_to_generate
        if scores:
            _check(hf, request, scores)
            assert result.num_cached_tokens == 0
    assert found[3][0].tokens == found[-1][0].tokens


def _check(hf, request: StarRequest, scores: list[TokenScore | None]) -> None:
    tokens = request.context_tokens + request.query_tokens
    logits = dense_logits(hf, tokens, len(request.context_tokens), request.star)
    first, *others = scores
    assert first is None and len(others) == len(tokens) - 1
    for token, row, score in zip(tokens[1:], logits.log_softmax(-1), others, strict=False):
        assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert abs(score.rank - 1 - int((row > row[token]).sum())) <= 1  # of two as likely
        values = [value for _, value in score.top]
        assert values == pytest.approx(row.topk(request.prompt_logprobs).values.tolist(), abs=1e-4)
        assert [row[token].item() for token, _ in score.top] == pytest.approx(values, abs=1e-4)


def test_scores_that_are_no_numbers_end_their_request_by_name(checkpoints):
    _, megatron = checkpoints("qwen3")
    ((result, _),) = run_ranks(1, scored_ranks.scored_by_damaged_weights, str(megatron), PROMPTS[0])[0]
    assert (result.finish_reason, result.tokens) == ("error", [])
    assert "log-probabilities of the prompt are not finite" in result.error
