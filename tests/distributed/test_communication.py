"""What crosses ranks, counted by torch's profiler and not by our own code.

Of the last layer a context only needs the KV, so no source is read in it.
"""

import pytest
from distributed import run_ranks
from models import random_tokens
from ranks import communication

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import encoding_bytes
from megatron_star.planning.kv_memory import KvLayers

LAYERS, ENCODED_LAYERS, KV_BYTES_PER_TOKEN_AND_LAYER = 3, 2, 2 * 3 * 16 * 4


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("wave_tokens", [1000, 10])
def test_only_the_anchors_kv_crosses_ranks_once_a_layer_and_wave(checkpoints, cp_size, wave_tokens):
    _, megatron = checkpoints("llama")
    config = StarConfig(block_size=10, anchor_size=6, wave_tokens=wave_tokens)
    results = run_ranks(cp_size, communication, str(megatron), random_tokens(84), 80, config)
    num_waves = len(results[0][3].waves)
    assert num_waves == (1 if wave_tokens == 1000 else 8 // cp_size)
    for encoding, _, counts, _ in results:
        assert encoding == ["c10d::broadcast_"] * ENCODED_LAYERS * num_waves
        assert counts.get("broadcast_bytes", 0) in (
            0,
            ENCODED_LAYERS * num_waves * 6 * KV_BYTES_PER_TOKEN_AND_LAYER,
        )
    assert sum(counts.get("broadcasts", 0) for _, _, counts, _ in results) == ENCODED_LAYERS * num_waves


@pytest.mark.parametrize("wave_tokens", [1000, 10])
def test_passed_keys_and_the_anchor_cross_ranks_in_one_all_gather_a_layer_and_wave(checkpoints, wave_tokens):
    """In one wave, 6 + 4 keys that the first block of 10 names, and 4 of each of the rank's three others."""
    _, megatron = checkpoints("llama")
    config = StarConfig(block_size=10, anchor_size=6, passed_keys=4, wave_tokens=wave_tokens)
    results = run_ranks(2, communication, str(megatron), random_tokens(84), 80, config)
    num_waves = len(results[0][3].waves)
    for encoding, _, counts, _ in results:
        assert len(encoding) == ENCODED_LAYERS * num_waves and all("gather" in name for name in encoding)
        if num_waves == 1:
            num_bytes = ENCODED_LAYERS * (6 + 4 + 3 * 4) * KV_BYTES_PER_TOKEN_AND_LAYER
            assert counts["pass_bytes"] == num_bytes


def test_a_recomputed_anchor_sends_nothing_while_encoding(checkpoints):
    _, megatron = checkpoints("llama")
    config = StarConfig(block_size=10, anchor="recompute")
    for encoding, *_ in run_ranks(2, communication, str(megatron), random_tokens(84), 80, config):
        assert encoding == []


def test_exact_mode_sends_every_key_once_to_whoever_lacks_it(checkpoints):
    _, megatron = checkpoints("llama")
    config = StarConfig(mode="exact")
    results = run_ranks(2, communication, str(megatron), random_tokens(84), 80, config)
    sent = sum(counts.get("broadcast_bytes", 0) for _, _, counts, _ in results)
    last_piece = 20  # nobody comes after it
    assert sent == ENCODED_LAYERS * (80 - last_piece) * KV_BYTES_PER_TOKEN_AND_LAYER


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize(
    "config",
    [
        StarConfig(block_size=10, neighbor_blocks=1),
        StarConfig(block_size=33, anchor_size=5, wave_tokens=20),
        StarConfig(block_size=10, anchor_size=6, passed_keys=3, wave_tokens=20),
        StarConfig(block_size=33, anchor_size=5, passed_keys=9, neighbor_blocks=1, wave_tokens=20),
        StarConfig(mode="exact", wave_tokens=15),
    ],
    ids=["neighbors", "spread blocks", "passed keys", "passed keys of spread blocks", "exact"],
)
def test_the_bytes_that_are_sent_are_those_of_the_cost_model(checkpoints, cp_size, config):
    _, megatron = checkpoints("llama")
    results = run_ranks(cp_size, communication, str(megatron), random_tokens(84), 80, config)
    kinds = ("broadcast_bytes", "pass_bytes")
    sent = sum(counts.get(kind, 0) for _, _, counts, _ in results for kind in kinds)
    kv = KvLayers((None,) * LAYERS, KV_BYTES_PER_TOKEN_AND_LAYER)
    assert sent == encoding_bytes(results[0][3], kv) > 0


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize(
    ("parts", "num_gathers", "num_sums"), [((), LAYERS, 0), (("mlp", "output"), LAYERS + 1, LAYERS)]
)
def test_a_decoding_step_makes_one_collective_a_layer_and_one_for_each_slice(
    checkpoints, cp_size, parts, num_gathers, num_sums
):
    _, megatron = checkpoints("llama")
    config = StarConfig(block_size=10)
    results = run_ranks(
        cp_size, communication, str(megatron), random_tokens(84), 80, config, frozenset(parts)
    )
    for _, decoding, _, _ in results:
        assert sum("gather" in name for name in decoding) == num_gathers
        assert sum("allreduce" in name for name in decoding) == num_sums == len(decoding) - num_gathers


def test_a_single_rank_sends_nothing(checkpoints):
    _, megatron = checkpoints("llama")
    config = StarConfig(block_size=10)
    ((encoding, decoding, counts, _),) = run_ranks(
        1, communication, str(megatron), random_tokens(84), 80, config
    )
    assert encoding == decoding == [] and counts == {}
