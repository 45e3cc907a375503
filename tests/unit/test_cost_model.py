"""Costs agree with arithmetic written out."""

from types import SimpleNamespace

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import (
    PartTimes,
    choose_plan,
    kv_layers,
    latent_form,
    parts_worth_slicing,
    token_costs,
)
from megatron_star.planning.plan import ContextPlan

LLAMA_8B = SimpleNamespace(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    gated_linear_unit=True,
    num_moe_experts=None,
    moe_layer_freq=1,
    moe_router_topk=2,
    moe_ffn_hidden_size=None,
    moe_shared_expert_intermediate_size=None,
)


BEHIND_QKV = 4096 * 4096 + 3 * 4096 * 14336
"""Weights of a layer of Llama 8B that a context does not meet in the last one: the projection and the MLP."""


def test_a_token_of_llama_8b_costs_twice_the_weights_that_it_meets():
    """All but the embedding, the head (8.03e9 - 2 * 128256 * 4096, and norms) and most of the last layer."""
    assert token_costs(LLAMA_8B).linear_per_token == 2 * (6_979_321_856 - BEHIND_QKV)
    assert token_costs(LLAMA_8B).attention_per_pair == 4 * 31 * 4096


def test_a_token_costs_its_own_experts_and_the_shared_ones():
    """Mixtral 8x7B is Llama 8B with eight such MLPs, of which a token uses two, and a router."""
    experts = {"num_moe_experts": 8, "moe_ffn_hidden_size": 14336}
    mixtral = SimpleNamespace(**vars(LLAMA_8B) | experts)
    second_expert, router = 3 * 4096 * 14336, 8 * 4096
    dense = token_costs(LLAMA_8B).linear_per_token
    assert token_costs(mixtral).linear_per_token == dense + 2 * 31 * (router + second_expert)
    shared = SimpleNamespace(**vars(mixtral) | {"moe_shared_expert_intermediate_size": 1000})
    more = token_costs(shared).linear_per_token - token_costs(mixtral).linear_per_token
    assert more == 2 * 31 * 3 * 4096 * 1000


def test_kv_of_llama_8b_is_128_kib_a_token_in_bf16():
    for tp_size, kib in ((1, 128), (8, 16), (16, 16)):
        kv = kv_layers(LLAMA_8B, tp_size=tp_size, bytes_per_value=2)
        assert kv.of_tokens(10) == 10 * kib * 1024


def test_the_cost_of_a_plan_is_the_slowest_ranks():
    costs = token_costs(LLAMA_8B)
    plan = ContextPlan.build(4000, 2, StarConfig(block_size=1000), costs)
    pairs = 2 * (1000 * 1001 / 2 + 1000 * 1000)  # the second rank: two blocks, each with the anchor
    assert plan.cost(costs) == costs.linear_per_token * 2000 + costs.attention_per_pair * pairs


def test_recomputing_the_anchor_doubles_the_linear_work_of_later_blocks():
    costs = token_costs(LLAMA_8B)
    plan = ContextPlan.build(4000, 4, StarConfig(block_size=1000, anchor="recompute"), costs)
    assert plan.cost(costs) == costs.linear_per_token * 2000 + costs.attention_per_pair * (2000 * 2001 / 2)


def test_auto_takes_star_only_where_it_costs_less():
    costs = token_costs(LLAMA_8B)
    modes = [
        choose_plan(n, 4, StarConfig(mode="auto", block_size=32768), costs)[0]
        for n in (0, 1000, 32768, 262144)
    ]
    assert modes == ["exact", "exact", "exact", "star"]


def test_a_part_is_sliced_where_its_collectives_take_less_time_than_the_reading_saves():
    times = {"mlp": PartTimes(10.0, 4.9), "qkv": PartTimes(10.0, 5.1), "output": PartTimes(1.0, 0.0)}
    assert parts_worth_slicing(times, 2) == {"mlp", "output"}
    assert parts_worth_slicing(times, 4) == {"mlp", "output", "qkv"}
    assert parts_worth_slicing(times, 1) == frozenset()


DEEPSEEK_V3 = SimpleNamespace(
    num_layers=61,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_attention_heads=128,
    num_query_groups=128,
    kv_channels=192,
    gated_linear_unit=True,
    num_moe_experts=256,
    moe_router_topk=8,
    moe_ffn_hidden_size=2048,
    moe_shared_expert_intermediate_size=2048,
    moe_layer_freq=[0] * 3 + [1] * 58,
    multi_latent_attention=True,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
)


def test_the_kv_of_latent_attention_is_512_latent_and_64_rotated_values_on_every_tp_rank():
    """Once, not as key and as value; 61 layers in bfloat16."""
    for tp_size in (1, 8, 128):
        kv = kv_layers(DEEPSEEK_V3, tp_size=tp_size, bytes_per_value=2)
        assert kv.bytes_per_token == 2 * 576
        assert kv.of_tokens(1000) == 1000 * 61 * 2 * 576 == 70_272_000


def test_a_source_is_projected_up_where_enough_rows_read_it():
    """Of DeepSeek-V3, a pair is 320 values expanded and 1,088 absorbed; a projection 512 * 256 = 131,072.

    131,072 / (1,088 - 320) = 170.7: with more rows expanding costs less, whatever the number of keys; with
    fewer, only if the rows are nearly as many as the keys.
    """
    assert latent_form(1, 100_000, DEEPSEEK_V3) == "absorbed"
    assert latent_form(170, 1_000_000, DEEPSEEK_V3) == "absorbed"
    assert latent_form(171, 1_000_000, DEEPSEEK_V3) == "expanded"
    assert latent_form(100, 100, DEEPSEEK_V3) == "expanded"
    for rows, keys in ((1, 1), (20, 23), (20, 24), (170, 37_000), (170, 33_000)):
        expanded = 320 * rows * keys + 131_072 * keys
        absorbed = 1088 * rows * keys + 131_072 * rows
        cheaper = "expanded" if expanded <= absorbed else "absorbed"
        assert latent_form(rows, keys, DEEPSEEK_V3) == cheaper
