"""Routers choose the experts that transformers' routers choose, and weigh them so."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from expert_blocks import (
    BLOCKS,
    HIDDEN,
    NUM_EXPERTS,
    config_of_experts,
    expert_layer,
    megatron_state,
    one_rank,
    random_block,
    router_of,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from megatron_star.model.layer_spec import layer_spec
from megatron_star.model.router import StarRouter, choose_experts, with_star_router

NUM_TOKENS = 211


@pytest.fixture(scope="module", autouse=True)
def groups():
    with one_rank() as groups:
        yield groups


def both(name, groups, dtype=torch.float32):
    """A block of transformers, and Megatron's layer with the same weights."""
    theirs = random_block(BLOCKS[name])
    ours = expert_layer(config_of_experts(dtype, **BLOCKS[name].args), groups)
    ours.load_state_dict(megatron_state(theirs))
    return theirs, ours


def chosen_by(theirs, hidden_states):
    """[tokens, E], bool, of transformers' router."""
    *_, last = router_of(theirs)(hidden_states)
    if last.dtype == torch.int64:
        return torch.zeros(len(last), NUM_EXPERTS, dtype=torch.bool).scatter(1, last, True)
    top = last.topk(theirs.top_k, dim=1).indices  # Llama 4 returns scores and logits
    return torch.zeros_like(last, dtype=torch.bool).scatter(1, top, True)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_layer_of_experts_is_transformers(name, groups):
    theirs, ours = both(name, groups)
    hidden_states = torch.randn(1, NUM_TOKENS, HIDDEN)
    expected = theirs(hidden_states)
    expected = expected[0] if isinstance(expected, tuple) else expected
    rows = hidden_states.transpose(0, 1)
    _, routing_map = ours.router(rows)
    out, bias = ours(rows)
    assert bias is None
    assert torch.equal(routing_map, chosen_by(theirs, hidden_states.flatten(0, 1)))
    torch.testing.assert_close(out.flatten(0, 1), expected.reshape(NUM_TOKENS, HIDDEN), atol=1e-5, rtol=1e-5)


SCORES = {
    "softmax": {},
    "softmax before": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
}
GROUPS = {"all": {}, "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2}}


MEGATRONS = [
    *itertools.product(SCORES, ["all"], [2, 4]),
    *itertools.product(["softmax before", "sigmoid"], ["groups"], [2, 4]),
    *itertools.product(["softmax before", "sigmoid"], ["all"], [1]),
]
"""With softmax over the chosen experts Megatron adds up logits of a group, not scores."""


@pytest.mark.parametrize(("score", "among", "topk"), MEGATRONS)
def test_ours_is_megatrons_choice_where_megatron_has_one(score, among, topk):
    with_bias = score == "sigmoid"
    config = config_of_experts(
        **SCORES[score],
        **GROUPS[among],
        moe_router_topk=topk,
        moe_router_topk_scaling_factor=1.7,
        moe_router_enable_expert_bias=with_bias,
    )
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    bias = torch.randn(NUM_EXPERTS) if with_bias else None
    weights, experts = choose_experts(logits, config, bias)
    expected, routing_map = moe_utils.topk_routing_with_score_function(
        logits,
        topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=1.7,
        score_function=config.moe_router_score_function,
        expert_bias=bias,
    )
    assert routing_map.gather(1, experts).all() and experts.shape == (NUM_TOKENS, topk)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(1, experts, weights), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "gpt_oss"])
def test_a_router_of_a_bfloat16_model_chooses_in_float32(name, groups):
    theirs, ours = both(name, groups, torch.bfloat16)
    hidden_states = torch.randn(7 * NUM_TOKENS, HIDDEN).bfloat16()
    rounded = random_block(BLOCKS[name]).bfloat16()
    expected = chosen_by(theirs, hidden_states.float())
    assert not torch.equal(chosen_by(rounded, hidden_states), expected), "no token tells them apart"
    probs, routing_map = ours.router(hidden_states.unsqueeze(1))
    assert torch.equal(routing_map, expected)
    assert probs.dtype == torch.float32


def test_what_a_router_has_stays_float32_to_the_last_bit(groups):
    theirs, ours = both("deepseek_v3", groups)
    state = {name: tensor for name, tensor in megatron_state(theirs).items() if name.startswith("router")}
    for cast in (ours.bfloat16(), ours.half(), ours.to("cpu", torch.bfloat16)):
        assert cast.experts.local_experts[0].linear_fc1.weight.dtype != torch.float32
        for name, tensor in state.items():
            assert torch.equal(
                cast.get_parameter(name) if "bias" not in name else cast.router.expert_bias, tensor
            )


def test_a_router_does_not_call_transformer_engine(groups, monkeypatch):
    """Whose product fails on a CPU; where it is installed, Megatron's router calls it."""
    _, ours = both("mixtral", groups)
    rows = torch.randn(NUM_TOKENS, 1, HIDDEN)
    expected = F.linear(rows, ours.router.weight)
    monkeypatch.setattr(moe_utils, "te_general_gemm", lambda *_, **__: 1 / 0)
    torch.testing.assert_close(ours.router.gating(rows), expected)
    ours.router(rows)
    with pytest.raises(ZeroDivisionError):
        TopKRouter.gating(ours.router, rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 3},
            "moe_router_topk 3 is more than the 2 experts",
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 3, "moe_router_topk": 2},
            "moe_router_topk 2 is less than moe_router_group_topk 3",
        ),
        ({"moe_router_normalised": False}, "moe_router_normalised=False"),
        (
            {"moe_router_score_function": "sqrtsoftplus", "moe_router_normalised": False},
            "moe_router_score_function='sqrtsoftplus'",
        ),
        ({"moe_latent_size": 16}, "moe_latent_size=16.*TransformerEngine, which is not installed"),
    ],
)
def test_what_no_router_can_choose_is_refused_by_its_name(args, message, groups):
    with pytest.raises(ValueError, match=message):
        expert_layer(config_of_experts(**args), groups)


def test_a_router_that_is_not_megatrons_own_stays(groups):
    mlp = layer_spec(config_of_experts(), "local", groups).layer_specs[0].submodules.mlp
    assert mlp.keywords["submodules"].router is StarRouter
    assert with_star_router(mlp) is mlp
