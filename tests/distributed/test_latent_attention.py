"""Multi-head latent attention equals a dense forward of transformers' DeepSeek models with the plan's mask.

Dense layers only: experts have tests of their own.
"""

import pytest
import torch
from distributed import RankError, run_ranks
from latent_oracle import CONFIGS, dense_logits, logits_of_case, megatron_arguments, megatron_weights
from latent_ranks import batch_and_alone, expansions, latent_answers, logits_of_forms, memory
from models import random_tokens
from passed_keys_ranks import Case
from reference import block_edges, star_mask

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.kv_memory import TAIL_CHUNK_TOKENS, spare_capacity

TOLERANCE = 1e-4
TOKENS = random_tokens(160)
LATENT_BYTES = 4 * (20 + 8)
"""Of a token in a layer, in float32: the latent and the rotated part of the key, for all heads together."""


def case(*turns: int, query: int = 5, **star: object) -> Case:
    """Context ends at the last turn."""
    return Case(StarConfig(**star), turns, query)


CASES = {
    "exact": case(101, mode="exact"),
    "exact in waves": case(101, mode="exact", wave_tokens=23),
    "more blocks than ranks": case(101, block_size=9),
    "neighbors, a small anchor": case(97, block_size=11, neighbor_blocks=2, anchor_size=4),
    "recomputed anchor, waves": case(101, block_size=13, anchor="recompute", wave_tokens=17),
    "waves within blocks": case(61, block_size=50, wave_tokens=7),
    "a query longer than the context": case(7, query=40, block_size=5),
    "passed keys": case(131, block_size=11, anchor_size=3, passed_keys=5),
    "passed keys of blocks spread over ranks": case(61, block_size=31, anchor_size=4, passed_keys=7),
    "passed keys in three turns": case(61, 83, 131, block_size=10, anchor_size=3, passed_keys=5),
    "passed keys, waves within blocks": case(131, block_size=33, anchor_size=5, passed_keys=9, wave_tokens=7),
}
GRIDS = [
    ("rotated in halves", 1, 1),
    ("rope", 1, 1),
    ("yarn", 1, 3),
    ("yarn", 2, 2),
    ("yarn, queries of full rank", 1, 2),
    ("yarn, queries of full rank", 2, 1),
]
"""Model, TP size, CP size."""


@pytest.mark.parametrize(("model", "tp_size", "cp_size"), GRIDS)
def test_every_plan_equals_a_dense_forward_with_its_mask(model, tp_size, cp_size):
    ask = megatron_arguments(model), megatron_weights(model), tp_size, TOKENS, list(CASES.values())
    of_ranks = run_ranks(tp_size * cp_size, latent_answers, *ask)
    problems = []
    for i, (name, asked) in enumerate(CASES.items()):
        expected = logits_of_case(model, TOKENS, asked)
        for rank, answers in enumerate(of_ranks):
            found = answers[i].logits[:, : expected.size(1)]
            difference = (found - expected).abs().max().item()
            if not (difference <= TOLERANCE and torch.equal(found.argmax(-1), expected.argmax(-1))):
                problems.append(f"{name}, rank {rank}: logits differ by {difference:.2g}")
    assert not problems, "\n".join(problems)


def test_yarn_differs_from_rope_and_its_scales_from_none_at_these_lengths():
    """Otherwise the comparisons would show nothing."""
    plain, scaled = (
        dense_logits(name, TOKENS[:101], lambda _: star_mask(101, 101), 101) for name in ("rope", "yarn")
    )
    assert (plain - scaled).abs().max() > 0.1


@pytest.mark.parametrize("name", ["exact in waves", "passed keys, waves within blocks"])
def test_every_form_gives_the_same_logits(name):
    model = "yarn"
    ask = megatron_arguments(model), megatron_weights(model), TOKENS, CASES[name]
    (found,) = run_ranks(1, logits_of_forms, *ask)
    forms = {name: forms for name, (_, forms) in found.items()}
    assert forms["absorbed"] == {"absorbed"} and forms["expanded"] == {"expanded"}
    assert forms["cheaper"] == {"absorbed", "expanded"}, "the cases show only one form"
    expected = found["cheaper"][0]
    for logits, _ in found.values():
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_source_that_several_segments_read_is_expanded_once():
    """Five blocks of 10 on one rank. Rows lie apart: before all but the first is a copy of the anchor."""
    star = StarConfig(block_size=10, anchor_size=4, anchor="recompute", neighbor_blocks=2)
    ask = megatron_arguments("rope"), megatron_weights("rope"), TOKENS[:50], star
    (seen,) = run_ranks(1, expansions, *ask)
    own = [10, 14, 14, 14, 14]
    sources = [6, 10, 10, 10]  # the rest of the first block, and the other blocks but the last
    assert seen == (own + sources) * 2, "of the last layer, nothing is attended to"


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 1), (1, 3), (2, 2)])
def test_the_latent_cache_has_the_bytes_of_the_formula(tp_size, cp_size):
    model, star = "yarn", StarConfig(block_size=9)
    ask = megatron_arguments(model), megatron_weights(model), tp_size, TOKENS[:104], star
    for found in run_ranks(tp_size * cp_size, memory, *ask):
        plan, rank, num_layers = found["plan"], found["cp_rank"], CONFIGS[model].num_hidden_layers
        num_tokens = plan.owned_tokens[rank]
        capacity = num_tokens + spare_capacity(num_tokens)
        assert found["context"] == capacity * num_layers * LATENT_BYTES
        planned = kv_layers(found["config"], tp_size=tp_size, bytes_per_value=4)
        assert found["context"] == planned.of_context(plan)[rank]
        tails = {0, TAIL_CHUNK_TOKENS * num_layers * LATENT_BYTES}
        assert found["tail"] in tails and planned.of_tail(3) == max(tails)
        anchor = block_edges(plan.num_tokens, star.block_size)[1]
        anchor_bytes = anchor * (num_layers - 1) * LATENT_BYTES if cp_size > 1 and rank == 0 else 0
        assert found["sent"].get("broadcast_bytes", 0) == anchor_bytes


def test_sequences_of_several_contexts_in_one_step_are_answered_as_each_alone():
    ask = megatron_arguments("yarn"), megatron_weights("yarn"), 1, TOKENS
    for together, alone in run_ranks(2, batch_and_alone, *ask):
        for one, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention_softcap": 30.0}, "does not support attention_softcap=30.0"),
        ({"qk_layernorm_after_rotation": True}, "does not support qk_layernorm_after_rotation=True"),
        ({"query_scale_beta": 0.1, "query_scale_floor": 9}, "does not support query_scale_beta=0.1"),
        ({"window_size": [12, 0]}, "does not support layers with a window"),
        ({"attention_chunk_size": 9, "chunked_layers": [1, 0, 1]}, "does not support layers with a window"),
    ],
)
def test_what_latent_attention_does_not_compute_is_refused_by_name(given, words):
    ask = megatron_arguments("rope") | given, megatron_weights("rope"), 1, TOKENS, []
    with pytest.raises(RankError, match=words):
        run_ranks(1, latent_answers, *ask)
