"""Star Attention on any grid of ranks equals a dense forward of the Hugging Face model with its mask."""

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from models import dense_logits, random_tokens
from ranks import star_logits

from megatron_star.config import StarConfig

NUM_CONTEXT, NUM_QUERY, NUM_GENERATED = 101, 7, 3
TOKENS = random_tokens(NUM_CONTEXT + NUM_QUERY + NUM_GENERATED)

STAR = {
    "a block for every rank of four": StarConfig(block_size=26),
    "more blocks than ranks": StarConfig(block_size=9),
    "fewer blocks than ranks": StarConfig(block_size=60),
    "one block": StarConfig(block_size=1000),
    "exact": StarConfig(mode="exact"),
    "exact in waves": StarConfig(mode="exact", wave_tokens=10),
    "one neighbor": StarConfig(block_size=13, neighbor_blocks=1),
    "two neighbors": StarConfig(block_size=11, neighbor_blocks=2, anchor_size=4),
    "a small anchor": StarConfig(block_size=20, anchor_size=5),
    "no anchor": StarConfig(block_size=20, anchor_size=0),
    "recomputed anchor": StarConfig(block_size=20, anchor="recompute"),
    "recomputed small anchor, split blocks": StarConfig(block_size=60, anchor_size=7, anchor="recompute"),
    "recomputed anchor, neighbors, waves": StarConfig(
        block_size=13, neighbor_blocks=1, anchor="recompute", wave_tokens=17
    ),
    "waves of whole blocks": StarConfig(block_size=9, wave_tokens=20),
    "waves within blocks": StarConfig(block_size=50, wave_tokens=7),
    "a token a wave": StarConfig(block_size=30, wave_tokens=1),
}


def assert_equals_dense(
    hf: Path,
    results: list[list[torch.Tensor]],
    configs: list[StarConfig],
    num_context: int,
    tokens: list[int],
) -> None:
    """Every rank's logits of every configuration are the oracle's, and so are the greedy tokens."""
    for i, config in enumerate(configs):
        expected = dense_logits(hf, tokens, num_context, config)[num_context + NUM_QUERY - 1 :]
        for of_rank in results:
            torch.testing.assert_close(of_rank[i], expected, atol=1e-4, rtol=0)
            assert torch.equal(of_rank[i].argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_star_equals_dense_for_every_plan(checkpoints, cp_size):
    hf, megatron = checkpoints("llama")
    configs = list(STAR.values())
    results = run_ranks(cp_size, star_logits, str(megatron), 1, TOKENS, NUM_CONTEXT, NUM_QUERY, configs)
    assert_equals_dense(hf, results, configs, NUM_CONTEXT, TOKENS)


@pytest.mark.parametrize(("tp_size", "cp_size"), [(2, 1), (2, 2)])
def test_one_kv_head_is_on_both_tp_ranks(checkpoints, tp_size, cp_size):
    """Every family runs on such grids in tests/families, with two KV heads."""
    hf, megatron = checkpoints("llama_one_kv_head")
    configs = [STAR["more blocks than ranks"], STAR["one neighbor"], STAR["exact"]]
    results = run_ranks(
        tp_size * cp_size, star_logits, str(megatron), tp_size, TOKENS, NUM_CONTEXT, NUM_QUERY, configs
    )
    assert_equals_dense(hf, results, configs, NUM_CONTEXT, TOKENS)


def test_an_odd_number_of_heads_is_divided_over_three_tp_ranks(checkpoints):
    hf, megatron = checkpoints("llama")
    configs = [STAR["more blocks than ranks"]]
    results = run_ranks(3, star_logits, str(megatron), 3, TOKENS, NUM_CONTEXT, NUM_QUERY, configs)
    assert_equals_dense(hf, results, configs, NUM_CONTEXT, TOKENS)


@pytest.mark.parametrize("num_context", [0, 1, 2, 97])
@pytest.mark.parametrize("cp_size", [1, 3])
def test_star_equals_dense_for_contexts_of_odd_lengths(checkpoints, num_context, cp_size):
    hf, megatron = checkpoints("qwen2")
    tokens = TOKENS[: num_context + NUM_QUERY + NUM_GENERATED]
    configs = [StarConfig(block_size=10), StarConfig(mode="exact")]
    results = run_ranks(cp_size, star_logits, str(megatron), 1, tokens, num_context, NUM_QUERY, configs)
    assert_equals_dense(hf, results, configs, num_context, tokens)


def test_a_query_longer_than_the_context_and_a_long_tail_are_exact(checkpoints):
    hf, megatron = checkpoints("llama")
    tokens = random_tokens(12 + NUM_QUERY + 300)
    configs = [StarConfig(block_size=5)]
    results = run_ranks(2, star_logits, str(megatron), 1, tokens, 12, NUM_QUERY, configs)
    assert_equals_dense(hf, results, configs, 12, tokens)


def test_two_blocks_with_a_whole_block_as_anchor_are_exact_attention(checkpoints):
    _, megatron = checkpoints("llama")
    configs = [StarConfig(block_size=51), StarConfig(mode="exact")]
    (star, exact), _ = run_ranks(2, star_logits, str(megatron), 1, TOKENS, NUM_CONTEXT, NUM_QUERY, configs)
    torch.testing.assert_close(star, exact, atol=1e-4, rtol=0)


def test_star_differs_from_exact_where_blocks_are_hidden(checkpoints):
    _, megatron = checkpoints("llama")
    configs = [StarConfig(block_size=20), StarConfig(mode="exact")]
    (star, exact), _ = run_ranks(2, star_logits, str(megatron), 1, TOKENS, NUM_CONTEXT, NUM_QUERY, configs)
    assert (star - exact).abs().max() > 0.1


def test_rotary_scaling_differs_from_the_default_at_these_lengths(checkpoints):
    """Otherwise the tests of scaled rotary embeddings would show nothing."""
    hf, _ = checkpoints("qwen2_yarn")
    plain, _ = checkpoints("qwen2")
    config = StarConfig(mode="exact")
    difference = dense_logits(hf, TOKENS, 0, config) - dense_logits(plain, TOKENS, 0, config)
    assert difference.abs().max() > 0.1
