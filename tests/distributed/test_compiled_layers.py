"""Compiled layers generate what Megatron's own forward pass does: the slow twin of every test here."""

import os
import shutil

import pytest
import torch
from compiled_ranks import (
    kept_after_generation,
    layers_of_two_kinds,
    logits_of_steps,
    refusal,
    refusal_of_the_last_layer,
    refusal_without_a_compiler,
    rows_of_experts,
)
from distributed import run_ranks
from models import random_tokens
from test_sliced_weights import ALL_PARTS, RANDOM

from megatron_star.speed.mailbox import LARGEST_BYTES
from megatron_star.speed.sliced_linear import NO_PARTS

CONTEXT = random_tokens(41)
A_QUERY_THEN_TOKENS = [[[5, 3, 8, 1, 2, 9, 4]], [[6]], [[7]], [[1]]]
BATCH = [random_tokens(41), random_tokens(41), random_tokens(23, seed=3), []]
BATCH_STEPS = [[[5, 3], [6], [7, 1, 4], [2]], [[1], [2], [3], [4]], [[5], [6], [7], [8]]]
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")


def assert_same(
    model,
    cp_size,
    row_counts,
    compiler,
    contexts,
    steps,
    *,
    parts=(NO_PARTS, ALL_PARTS),
    largest_message=LARGEST_BYTES,
    tp_size=1,
    ep_size=1,
):
    """On every rank, for each set of sliced parts; up to rounding, and the same greedy tokens."""
    arguments = (model, parts, row_counts, compiler, contexts, steps, largest_message, tp_size, ep_size)
    for of_rank in run_ranks(tp_size * cp_size, logits_of_steps, *arguments):
        for expected, found, as_many_messages in of_rank:
            assert as_many_messages
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-5)
                assert torch.equal(one.argmax(-1), other.argmax(-1))


@pytest.mark.parametrize(
    ("name", "cp_size"),
    [("llama", 1), ("llama_tied", 2), ("llama_one_kv_head", 3), ("qwen2", 2), ("qwen3", 3)],
)
def test_recorded_layers_give_the_logits_of_the_model(checkpoints, name, cp_size):
    """The query's 7 rows are filled up to 8."""
    assert_same(str(checkpoints(name)[1]), cp_size, [1, 8], "recorded", [CONTEXT], A_QUERY_THEN_TOKENS)


@pytest.mark.parametrize("name", ["biased", "biased, gated"])
def test_biases_are_recorded_too(name):
    assert_same(RANDOM[name], 3, [1, 8], "recorded", [CONTEXT], A_QUERY_THEN_TOKENS)


@pytest.mark.parametrize(
    ("name", "cp_size"), [("experts", 1), ("experts, gated", 2), ("experts after a dense layer, shared", 2)]
)
def test_experts_stay_outside_of_a_program(name, cp_size):
    assert_same(RANDOM[name], cp_size, [1, 6], "recorded", BATCH, BATCH_STEPS)


@pytest.mark.parametrize(("name", "cp_size"), [("latent", 2), ("latent, queries of full rank, experts", 1)])
@pytest.mark.parametrize("compiler", ["recorded", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_latent_attention_stays_outside_of_a_program(name, cp_size, compiler):
    rows = [1, 6] if compiler == "recorded" else [6]
    assert_same(RANDOM[name], cp_size, rows, compiler, BATCH, BATCH_STEPS)


def test_rows_that_fill_up_a_program_are_sent_to_no_expert():
    assert run_ranks(1, rows_of_experts, RANDOM["experts"], CONTEXT, 4) == [[1, 1]]


FOUR_EXPERTS = RANDOM["experts after a dense layer, shared"] | {"num_experts": 4}


@pytest.mark.parametrize(
    ("model", "tp_size", "cp_size", "ep_size"),
    [
        (RANDOM["biased, gated"], 2, 1, 1),
        (RANDOM["biased"] | {"num_query_groups": 1}, 2, 2, 1),
        (RANDOM["norms before and after, some biases, xielu"], 2, 1, 1),
        (RANDOM["latent"], 2, 1, 1),
        (FOUR_EXPERTS, 2, 1, 1),
        (FOUR_EXPERTS, 2, 1, 2),
        (FOUR_EXPERTS, 1, 2, 2),
        (FOUR_EXPERTS, 2, 2, 4),
    ],
    ids=[
        "sums of products",
        "a KV head on two ranks",
        "a norm over all heads",
        "latents",
        "a part of each expert",
        "experts of TP ranks",
        "experts of CP ranks",
        "experts of all ranks",
    ],
)
def test_what_tp_ranks_send_each_other_is_recorded_too(model, tp_size, cp_size, ep_size):
    sizes = {"tp_size": tp_size, "ep_size": ep_size}
    assert_same(model, cp_size, [1, 6], "recorded", BATCH, BATCH_STEPS, **sizes)


@pytest.mark.parametrize("largest_message", [-1, LARGEST_BYTES])
def test_sums_over_tp_are_messages_in_shared_memory_or_collectives(largest_message):
    options = {"parts": [NO_PARTS], "tp_size": 2, "largest_message": largest_message}
    assert_same(RANDOM["biased"], 1, [4], "recorded", BATCH, BATCH_STEPS, **options)


@NEEDS_COMPILER
def test_compiled_layers_of_tp_ranks_give_the_logits_of_the_model():
    options = {"parts": [ALL_PARTS], "tp_size": 2}
    assert_same(RANDOM["biased, gated"], 2, [4], "inductor", BATCH, BATCH_STEPS, **options)


@pytest.mark.parametrize("compiler", ["recorded", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_each_layer_keeps_its_own_way_with_positions(compiler):
    """Interleaved pairs of a part of the head, two bases, a layer that rotates nothing and scales queries."""
    positions = {
        "num_layers": 3,
        "rotary_interleaved": True,
        "rotary_percent": 0.5,
        "no_rope_freq": [0, 0, 1],
        "window_size": [4, 0],
        "window_attn_skip_freq": [0, 1, 0],
        "window_rotary_base": 20.0,
        "query_scale_beta": 0.5,
        "query_scale_floor": 8,
        "query_scale_layers": [0, 0, 1],
    }
    assert_same(RANDOM["biased"] | positions, 1, [1, 8], compiler, [CONTEXT], A_QUERY_THEN_TOKENS)


@pytest.mark.parametrize("row_counts", [[4], [6], [3, 16]], ids=["exact", "filled up", "two numbers"])
def test_sequences_of_a_batch_keep_apart(checkpoints, row_counts):
    """The first step has more rows than some programs, and runs as it is there."""
    assert_same(str(checkpoints("qwen3")[1]), 2, row_counts, "recorded", BATCH, BATCH_STEPS)


@pytest.mark.parametrize("largest_message", [-1, 1_300])
def test_messages_that_do_not_fit_into_shared_memory_are_collectives(checkpoints, largest_message):
    """All of them; or outputs and logits, which have more bytes than sums and columns of QKV."""
    model = str(checkpoints("qwen3")[1])
    assert_same(model, 2, [4], "recorded", BATCH, BATCH_STEPS, largest_message=largest_message)


@NEEDS_COMPILER
def test_compiled_layers_give_the_logits_of_the_model(checkpoints):
    model = str(checkpoints("qwen3")[1])
    assert_same(model, 2, [5], "inductor", BATCH, BATCH_STEPS, parts=[ALL_PARTS])


def test_layers_that_differ_have_programs_of_their_own():
    """Each in two pieces, before and after attention."""
    assert run_ranks(1, layers_of_two_kinds, RANDOM["biased, gated"], CONTEXT) == [(4, True)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_over_holds_no_kv(compiled):
    assert run_ranks(1, kept_after_generation, RANDOM["biased, gated"], CONTEXT, compiled) == [False]


@pytest.mark.parametrize(
    ("name", "tp_size", "row_counts", "message"),
    [
        ("biased", 1, [0, 4], "compiled for 0 sequences: it must be 1 to 64"),
        ("biased", 1, [4, 65], "compiled for 65 sequences: it must be 1 to 64"),
    ],
    ids=["no row", "too many rows"],
)
def test_what_cannot_be_compiled_is_refused_by_name(name, tp_size, row_counts, message):
    first, *_ = run_ranks(tp_size, refusal, RANDOM[name], tp_size, row_counts)
    assert first == "layers cannot be " + message


def test_every_layer_is_looked_at_before_any_is_compiled():
    (message,) = run_ranks(1, refusal_of_the_last_layer, RANDOM["experts after a dense layer, shared"])
    assert message == "layers cannot be compiled for token generation with layers of OtherLayer"


def test_a_missing_compiler_is_named():
    (message,) = run_ranks(1, refusal_without_a_compiler, RANDOM["biased"])
    assert "layers could not be compiled" in message and "no-such-compiler" in message
