"""What ranks compute for a context with experts and with latent attention is what the cost model says, and so
is the memory that latents take."""

from types import SimpleNamespace

import pytest
from distributed import run_ranks
from kv_ranks import counted_work, engine_memory, question
from models import random_tokens
from small_model import SMALL

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import latent_form, token_costs
from megatron_star.planning.kv_memory import TAIL_CHUNK_TOKENS, spare_capacity
from megatron_star.planning.planner import Planner

TOKENS = random_tokens(97)
MODEL = SMALL | {"num_layers": 4, "ffn_hidden_size": 40}
EXPERTS = MODEL | {
    "num_experts": 6,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_ffn_hidden_size": 10,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_intermediate_size": 14,
    "moe_shared_expert_gate": True,
}


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(
    "star", [StarConfig(block_size=9), StarConfig(mode="exact", wave_tokens=17)], ids=str
)
def test_ranks_compute_the_operations_of_the_experts_that_tokens_choose(star, cp_size):
    """A dense layer, two of experts with a gated shared one, and one of which only the KV is wanted."""
    results = run_ranks(cp_size, counted_work, EXPERTS, TOKENS, star)
    _, linear, attention = results[0]
    assert sum(counted.linear for counted, *_ in results) == linear
    assert sum(counted.attention for counted, *_ in results) == attention


LATENT = MODEL | {
    "num_query_groups": 3,
    "group_query_attention": False,
    "kv_channels": 12 + 8,
    "multi_latent_attention": True,
    "q_lora_rank": 18,
    "kv_lora_rank": 20,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 10,
    "qk_layernorm": True,
    "rotary_base": 1000,
    "rotary_interleaved": True,
}
"""More than 24 rows expand what they see, fewer absorb, unless they are nearly as many as what they see."""
PLANS = {
    "star": StarConfig(block_size=9),
    "neighbors": StarConfig(block_size=31, anchor_size=12, neighbor_blocks=1),
    "recomputed anchors, neighbors": StarConfig(block_size=12, anchor="recompute", neighbor_blocks=2),
    "passed keys": StarConfig(block_size=30, anchor_size=4, passed_keys=7, wave_tokens=11),
    "exact": StarConfig(mode="exact", wave_tokens=40),
    "exact, short waves": StarConfig(mode="exact", wave_tokens=7),
}


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_ranks_compute_the_operations_of_the_cheaper_form_of_latent_attention(name, cp_size):
    results = run_ranks(cp_size, counted_work, LATENT, TOKENS, PLANS[name])
    _, linear, attention = results[0]
    assert sum(counted.linear for counted, *_ in results) == linear
    assert sum(counted.attention for counted, *_ in results) == attention


def test_both_forms_are_among_these_plans():
    shape = SimpleNamespace(**LATENT)
    assert {latent_form(rows, 97, shape) for rows in (7, 40)} == {"absorbed", "expanded"}


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_engine_reserves_the_latents_that_ranks_come_to_hold_and_no_more(cp_size):
    """20 latent and 8 rotated values of 4 bytes a token and layer, whatever the heads; shared and extended
    contexts, passed keys with their copies, and tails.
    """
    star = StarConfig(block_size=30, anchor_size=4, passed_keys=7, wave_tokens=11)
    requests = [
        question(TOKENS[:61], TOKENS[:40], star, 3),
        question(TOKENS, TOKENS[:5], star, 20, (61,)),
        question([], TOKENS[:20], star, 20),
    ]
    results = run_ranks(cp_size, engine_memory, LATENT, requests)
    _, reserved, reported = results[0]
    most_held: dict[int, list[int]] = {}
    for step, (contexts, tails, _) in enumerate(reserved):
        memory = [of_rank[0][step] for of_rank in results]
        for number in contexts:
            held = [of_rank.contexts.get(number, 0) for of_rank in memory]
            most_held[number] = [max(pair) for pair in zip(held, most_held.get(number, held), strict=True)]
        for rank, of_rank in enumerate(memory):
            for number, held in of_rank.tails.items():
                tail_rank, tail_bytes = tails[number]
                assert held <= (tail_bytes if rank == tail_rank else 0)
    assert most_held == reserved[-1].contexts
    of_a_token = MODEL["num_layers"] * (20 + 8) * 4
    assert reserved[-1].tails[2][1] == TAIL_CHUNK_TOKENS * of_a_token
    spare = [sum(map(spare_capacity, plan.owned_tokens)) for plan in chain_of(star, cp_size)]
    assert reported[1]["full"] == (97 + sum(spare) + TAIL_CHUNK_TOKENS) * of_a_token


def chain_of(star, cp_size):
    """Plans of 61 tokens and of all 97."""
    costs = token_costs(SimpleNamespace(**LATENT | NOT_IN_ARGUMENTS))
    return Planner(costs, cp_size).chain((61, 97), star)


NOT_IN_ARGUMENTS = {"gated_linear_unit": True, "num_moe_experts": None}
"""Of Megatron's configuration."""
