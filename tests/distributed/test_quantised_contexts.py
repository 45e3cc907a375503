"""Contexts in 8 bits: who reads them answers as one whose stored KV is rounded to 8 bits and back."""

import pytest
import torch
from distributed import run_ranks
from models import random_tokens
from quantised_ranks import NUM_GENERATED, NUM_QUERY, Case, answers, changed_by_reading
from small_model import SMALL

from megatron_star.config import StarConfig

MODEL = SMALL | {
    "padded_vocab_size": 258,
    "num_layers": 4,
    "kv_channels": 16,
    "num_attention_heads": 6,
    "num_query_groups": 2,
}
WINDOWS = {"num_layers": 5, "window_size": [12, 0], "window_attn_skip_freq": [1, 0, 0, 1, 0]}
TOKENS = random_tokens(97 + NUM_QUERY + NUM_GENERATED)

CASES = {
    "one wave": Case(StarConfig(block_size=20), (97,)),
    "several waves, spread blocks": Case(StarConfig(block_size=33, wave_tokens=11), (97,)),
    "exact, waves that cut blocks": Case(StarConfig(mode="exact", wave_tokens=13), (97,)),
    "neighbors, turns": Case(StarConfig(block_size=9, neighbor_blocks=1, wave_tokens=15), (30, 36, 97)),
    "passed keys, turns and waves": Case(
        StarConfig(block_size=9, anchor_size=5, neighbor_blocks=1, passed_keys=4, wave_tokens=11), (36, 97)
    ),
    "passed keys of spread blocks": Case(StarConfig(block_size=33, passed_keys=9, wave_tokens=12), (97,)),
    "a recomputed anchor": Case(StarConfig(block_size=20, anchor="recompute", wave_tokens=30), (97,)),
}


@pytest.mark.parametrize(
    ("num_ranks", "tp_size", "kv_dtype", "layers"),
    [(1, 1, "int8", {}), (2, 1, "int8", {}), (2, 2, "int8", {}), (2, 1, "fp8", {}), (2, 1, "int8", WINDOWS)],
)
def test_a_model_with_contexts_in_8_bits_equals_one_whose_stored_kv_is_rounded(
    num_ranks, tp_size, kv_dtype, layers
):
    """And differs from one that rounds nothing, but not by much; it takes the bytes that are planned."""
    found = run_ranks(num_ranks, answers, MODEL | layers, tp_size, kv_dtype, TOKENS, list(CASES.values()))
    for name, of_ranks in zip(CASES, zip(*found, strict=True), strict=True):
        for quantised, rounded, computed in of_ranks:
            assert torch.equal(quantised.logits, of_ranks[0][0].logits), name
            torch.testing.assert_close(quantised.logits, rounded, atol=1e-4, rtol=0, msg=name)
            scale = computed.std().item()
            error = (quantised.logits - computed).abs().max().item() / scale
            assert 1e-4 < error < (0.2 if kv_dtype == "int8" else 0.8), (name, error)
            assert quantised.num_exact == 0, name
            if not layers and not CASES[name].star.passed_keys:
                assert quantised.num_bytes == quantised.planned, name


@pytest.mark.parametrize(
    "star",
    [
        StarConfig(block_size=9, anchor_size=4, neighbor_blocks=1, passed_keys=3),
        StarConfig(block_size=33, passed_keys=9),
        StarConfig(mode="exact"),
    ],
)
def test_within_a_wave_nothing_that_is_rounded_is_read(star):
    for of_layers in run_ranks(2, changed_by_reading, MODEL, TOKENS[:97], star):
        assert len(of_layers) == MODEL["num_layers"] and max(of_layers) < 0.003
