"""Slices of the weights on CP ranks give what the whole weights give: the slow twin of every test here."""

import pytest
import torch
from distributed import RankError, run_ranks
from models import VOCAB_SIZE, random_tokens
from ranks import (
    chosen_parts,
    layers_of_sliced_experts,
    logits_whole_and_sliced,
    measured_choices,
    norms_and_mlps,
    sliceable_layers,
    slices_in_one_piece,
    sums_of_experts,
    weights_read,
)

from megatron_star.speed.sliced_linear import EXPERTS, NO_PARTS, PARTS

NUM_QUERY = 7
TOKENS = random_tokens(41 + NUM_QUERY + 3)
ALL_PARTS = frozenset(PARTS)

# Sizes that neither 2 nor 3 ranks divide evenly; every linear layer with a bias.
BIASED = {
    "num_layers": 2,
    "hidden_size": 52,
    "ffn_hidden_size": 74,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 10,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "padded_vocab_size": VOCAB_SIZE + 1,
    "max_position_embeddings": 512,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
}
RANDOM = {
    "biased": BIASED,
    "biased, gated": BIASED | {"swiglu": True},
    "experts": BIASED
    | {"add_bias_linear": False, "num_experts": 3, "moe_router_topk": 2, "moe_ffn_hidden_size": 20},
}
RANDOM["experts, gated"] = RANDOM["experts"] | {"swiglu": True}
RANDOM["experts after a dense layer, shared"] = RANDOM["experts, gated"] | {
    "moe_layer_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 30,
    "moe_shared_expert_gate": True,
}
RANDOM["experts with biases"] = BIASED | {"swiglu": True} | RANDOM["experts"] | {"add_bias_linear": True}
NO_BIASES = BIASED | {"add_bias_linear": False, "add_qkv_bias": False, "normalization": "RMSNorm"}
RANDOM |= {
    "norms before and after, some biases, xielu": NO_BIASES
    | {"norm_placement": "both", "residual_multiplier": 0.3, "activation": "xielu"}
    | {"add_proj_bias": True, "add_mlp_bias": True, "qk_layernorm": True, "qk_layernorm_span": "all_heads"},
    "norms after with unit offset, gated gelu": NO_BIASES
    | {"norm_placement": "after", "apply_layernorm_1p": True, "activation": "gelu_tanh", "gated_mlp": True}
    | {"embedding_multiplier": 7.0, "logits_multiplier": 0.3, "logits_softcap": 5.0},
    "parallel, squared relu": BIASED
    | {"parallel_mlp": True, "norm_bias": False, "activation": "relu2", "attention_output_gate": True},
    "norms after rotation": NO_BIASES | {"qk_layernorm": True, "qk_layernorm_after_rotation": True},
}
RANDOM["latent"] = NO_BIASES | {
    "multi_latent_attention": True,
    "q_lora_rank": 22,
    "kv_lora_rank": 14,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
    "group_query_attention": False,
    "num_query_groups": 4,
    "qk_layernorm": True,
    "swiglu": True,
    "rotary_interleaved": True,
    "rotary_base": 10000,
    "kv_channels": 10,
}
RANDOM["latent, queries of full rank, experts"] = (
    RANDOM["latent"] | {"q_lora_rank": None, "num_experts": 4, "moe_layer_freq": [0, 1]}
) | {"moe_router_topk": 2, "moe_ffn_hidden_size": 20, "moe_shared_expert_intermediate_size": 20}
CHECKPOINTS = ["llama", "llama_tied", "llama_one_kv_head", "qwen2", "qwen3"]


def logits(model, tp_size, cp_size, *parts):
    """Of every rank, for each set of parts: [1 + generated tokens, vocabulary]."""
    return run_ranks(tp_size * cp_size, logits_whole_and_sliced, model, tp_size, TOKENS, NUM_QUERY, parts)


def assert_same(sliced, whole):
    """Up to rounding; and the same greedy tokens."""
    torch.testing.assert_close(sliced, whole, atol=1e-4, rtol=1e-5)
    assert torch.equal(sliced.argmax(-1), whole.argmax(-1))


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 1), (1, 2), (1, 3), (2, 2)])
def test_sliced_weights_give_the_logits_of_whole_weights(checkpoints, name, tp_size, cp_size):
    if name == "llama" and tp_size == 2:
        pytest.skip("its 9 heads do not divide over 2 TP ranks")
    for whole, sliced in logits(str(checkpoints(name)[1]), tp_size, cp_size, NO_PARTS, ALL_PARTS):
        assert_same(sliced, whole)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 2), (1, 3), (2, 2)])
def test_biases_are_added_once_and_every_part_is_sliced(name, tp_size, cp_size):
    for whole, sliced in logits(RANDOM[name], tp_size, cp_size, NO_PARTS, ALL_PARTS):
        assert_same(sliced, whole)


@pytest.mark.parametrize(("tp_size", "cp_size", "ep_size"), [(1, 2, 2), (2, 2, 2), (2, 2, 4)])
def test_slices_beside_experts_that_are_spread_over_ranks(tp_size, cp_size, ep_size):
    """Over CP ranks; over the TP ranks of each, whose experts are sliced, too; and over both."""
    model = RANDOM["experts after a dense layer, shared"] | {"num_experts": 4}
    arguments = (model, tp_size, TOKENS, NUM_QUERY, (NO_PARTS, ALL_PARTS), ep_size)
    for whole, sliced in run_ranks(tp_size * cp_size, logits_whole_and_sliced, *arguments):
        assert_same(sliced, whole)


@pytest.mark.parametrize(
    ("tp_size", "cp_size", "ep_size", "sliced_layers"),
    [(1, 2, 1, 2), (1, 2, 2, 0), (2, 2, 1, 2), (2, 2, 2, 2), (2, 2, 4, 0)],
)
def test_experts_are_sliced_where_each_cp_rank_has_all(tp_size, cp_size, ep_size, sliced_layers):
    arguments = (RANDOM["experts"] | {"num_experts": 4}, tp_size, ep_size)
    assert set(run_ranks(tp_size * cp_size, layers_of_sliced_experts, *arguments)) == {sliced_layers}


@pytest.mark.parametrize(("tp_size", "cp_size", "ep_size"), [(1, 2, 2), (2, 2, 4), (2, 1, 2)])
def test_sums_over_the_ranks_of_experts_go_through_shared_memory(tp_size, cp_size, ep_size):
    """One for each of two layers and three steps, besides merges where the group is the CP group."""
    arguments = (RANDOM["experts"] | {"num_experts": 4}, tp_size, ep_size, TOKENS)
    for sums, sent, through_memory in run_ranks(tp_size * cp_size, sums_of_experts, *arguments):
        assert sums == 6 and through_memory == sent


def test_projections_of_latent_attention_are_sliced():
    (found,) = run_ranks(1, sliceable_layers, RANDOM["latent"])
    linears = [name.rpartition(".")[2] for name in found["qkv"][:3]]
    assert linears == ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj"]


def test_shared_experts_and_dense_layers_beside_experts_are_sliced():
    (found,) = run_ranks(1, sliceable_layers, RANDOM["experts after a dense layer, shared"])
    assert found["mlp"] == [
        f"decoder.layers.{mlp}.{linear}"
        for mlp in ("0.mlp", "1.mlp.shared_experts")
        for linear in ("linear_fc1", "linear_fc2")
    ]


def test_each_part_can_be_sliced_by_itself():
    parts = [frozenset([part]) for part in PARTS]
    for whole, *sliced in logits(RANDOM["biased, gated"], 1, 3, NO_PARTS, *parts):
        for of_part in sliced:
            assert_same(of_part, whole)


def test_all_ranks_have_the_same_bits():
    (first,), *others = logits(RANDOM["biased"], 1, 3, ALL_PARTS)
    assert all(torch.equal(first, other) for (other,) in others)


@pytest.mark.parametrize(("name", "tolerance"), [("biased, gated", 0.03), ("experts, gated", 0.05)])
def test_a_rank_reads_its_share_of_the_weights_as_views(name, tolerance):
    """A third, and up to two more rows or columns of each matrix where three do not divide them."""
    args = RANDOM[name]
    (of_one, views_of_one), *_ = run_ranks(1, weights_read, args, TOKENS[:1], ALL_PARTS)
    of_three = run_ranks(3, weights_read, args, TOKENS[:1], ALL_PARTS)
    assert views_of_one and all(views for _, views in of_three)
    assert all(num_bytes == pytest.approx(of_one / 3, rel=tolerance) for num_bytes, _ in of_three)


@pytest.mark.parametrize(
    ("parts", "by_columns", "expected"),
    [
        (ALL_PARTS, None, {"qkv", "proj", "mlp"}),
        (frozenset(["mlp"]), None, {"proj", "mlp"}),  # square ones lie by columns anyway
        (NO_PARTS, None, {"proj"}),
        (ALL_PARTS, True, {"proj"}),
        (ALL_PARTS, False, {"qkv"}),
    ],
    ids=["all", "mlp", "none", "measured: by columns", "measured: by rows"],
)
def test_slices_lie_in_one_piece_unless_that_was_measured_to_be_slower(parts, by_columns, expected):
    (found,) = run_ranks(1, slices_in_one_piece, RANDOM["biased, gated"], parts, by_columns)
    assert {part for part, in_one_piece in found.items() if in_one_piece} == expected


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 2), (2, 2)])
def test_what_is_measured_is_chosen_alike_on_all_ranks(checkpoints, tp_size, cp_size):
    first, *others = run_ranks(tp_size * cp_size, measured_choices, str(checkpoints("qwen3")[1]), tp_size)
    assert others == [first] * (tp_size * cp_size - 1)
    by_columns, _, ways, _ = first
    assert len(by_columns) > 4 and all(ways.values())


def test_auto_agrees_on_all_ranks_and_one_rank_has_nothing_to_divide(checkpoints):
    megatron = str(checkpoints("llama")[1])
    first, *others = run_ranks(3, chosen_parts, megatron, "auto")
    assert all(other == first for other in others) and first <= ALL_PARTS
    assert run_ranks(2, chosen_parts, megatron, "sliced") == [ALL_PARTS - {EXPERTS}] * 2
    assert run_ranks(1, chosen_parts, megatron, "sliced") == [NO_PARTS]


def test_an_unknown_choice_of_weights_is_refused(checkpoints):
    with pytest.raises(RankError, match="decode_weights is 'half'"):
        run_ranks(1, chosen_parts, str(checkpoints("llama")[1]), "half")


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [
        ("biased, gated", {"normalization": "RMSNorm"}, ("CpuRMSNorm", "SwigluInPlaceMLP")),
        ("biased, gated", {}, ("LayerNorm", "SwigluInPlaceMLP")),
        ("biased", {}, ("LayerNorm", "MLP")),
        ("experts, gated", {}, ("LayerNorm", "SlicedMoELayer")),
        ("norms before and after, some biases, xielu", {}, ("CpuRMSNorm", "XieluMLP")),
        (
            "norms after with unit offset, gated gelu",
            {"norm_placement": "both"},
            ("CpuUnitOffsetRMSNorm", "MLP"),
        ),
        ("parallel, squared relu", {}, ("LayerNorm", "MLP")),
    ],
    ids=["swiglu and rms norm", "swiglu", "gelu", "experts", "xielu", "unit offset", "parallel"],
)
def test_a_model_on_a_cpu_has_our_rms_norm_and_plain_swiglu(name, other, expected):
    assert run_ranks(1, norms_and_mlps, RANDOM[name] | other) == [expected]
