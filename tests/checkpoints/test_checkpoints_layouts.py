"""Fused tensors, tensors that only some models or layers have: both directions, by names and by rows."""

from typing import Any

import pytest
import torch

from checkpoints_tools.chunks import chunks
from checkpoints_tools.families.family import Family
from checkpoints_tools.families.weight import QKV, QKV_ROWS
from checkpoints_tools.families.weights import (
    ATTENTION,
    DENSE_MLP,
    attention,
    gated_mlp,
    layer_weight,
    norms,
    plain_mlp,
)
from checkpoints_tools.layouts import Heads, fuse, split

ARGS = {
    "num_layers": 3,
    "hidden_size": 12,
    "ffn_hidden_size": 10,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 7,
    "padded_vocab_size": 8,
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
}
HEADS = Heads(6, 2)


def names_and_keys(family: Family, **args: Any) -> dict[str, str]:
    """Of each Hugging Face tensor of layer 1, without its prefix, the Megatron key without its own."""
    return {
        source.name.removeprefix("model.layers.1."): chunk.key.removeprefix("decoder.layers.")
        for chunk in chunks(family, ARGS | args)
        for source in chunk.sources
        if ".1." in source.name
    }


@pytest.mark.parametrize("columns", [(3,), ()], ids=["weight", "bias"])
def test_a_fused_query_key_value_projection_is_the_three_projections_one_after_the_other(columns):
    draw = torch.Generator().manual_seed(0)
    parts = [torch.rand(heads * 4, *columns, generator=draw) for heads in (6, 2, 2)]
    of_three = fuse(QKV, parts, (40, *columns), HEADS)
    of_one = fuse(QKV_ROWS, [torch.cat(parts)], (40, *columns), HEADS)
    assert torch.equal(of_one, of_three)
    assert torch.equal(split(QKV_ROWS, of_one, [(40, *columns)], HEADS)[0], torch.cat(parts))


def test_megatrons_rows_are_of_each_group_its_queries_its_key_its_value():
    hf = torch.arange(40.0)  # heads of 4: queries 0 to 5 from row 0, keys from row 24, values from row 32
    found = fuse(QKV_ROWS, [hf], (40,), HEADS)[::4]
    assert found.tolist() == [0, 4, 8, 24, 32, 12, 16, 20, 28, 36]


def test_a_fused_family_has_the_keys_of_one_with_separate_projections():
    fused = Family(
        "fused",
        bridge_provider="Fused",
        layer=(*norms(), *attention(fused="qkv_proj"), *gated_mlp(fused="gate_up_proj")),
    )
    separate = Family("separate", bridge_provider="Separate")
    biases = {"add_qkv_bias": True, "add_mlp_bias": True}
    of_fused, of_separate = names_and_keys(fused, **biases), names_and_keys(separate, **biases)
    assert set(of_fused.values()) == set(of_separate.values())
    assert of_fused["self_attn.qkv_proj.bias"] == of_separate["self_attn.k_proj.bias"]
    assert of_fused["mlp.gate_up_proj.weight"] == of_separate["mlp.up_proj.weight"]
    assert "self_attn.q_proj.weight" not in of_fused and "mlp.gate_proj.weight" not in of_fused


NORMS = norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
BEFORE = {"input_layernorm.weight", "post_attention_layernorm.weight"}
AFTER = {"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"}
ASKED_FOR = {
    "norms before": ({"norm_placement": "before"}, BEFORE),
    "norms before, by default": ({}, BEFORE),
    "norms after": ({"norm_placement": "after"}, AFTER),
    "norms before and after": ({"norm_placement": "both"}, BEFORE | AFTER),
    "one norm for attention and MLP": ({"parallel_mlp": True}, {"input_layernorm.weight"}),
    "norms with biases": (
        {"normalization": "LayerNorm", "norm_placement": "after"},
        AFTER | {"post_self_attn_layernorm.bias", "post_mlp_layernorm.bias"},
    ),
    "LayerNorm without biases": ({"normalization": "LayerNorm", "norm_bias": False}, BEFORE),
}


@pytest.mark.parametrize("args, expected", ASKED_FOR.values(), ids=ASKED_FOR)
def test_the_norms_of_a_layer_are_those_that_the_arguments_ask_for(args, expected):
    assert names_and_keys(Family("x", bridge_provider="X", layer=NORMS), **args).keys() == expected


OF_ATTENTION = {
    "biases of query, key, value": ({"add_qkv_bias": True}, {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
    "a bias of the output": ({"add_proj_bias": True}, {"o_proj.bias"}),
    "biases of all linear layers": (
        {"add_bias_linear": True},
        {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"},
    ),
    "norms of query and key": ({"qk_layernorm": True}, {"q_norm.weight", "k_norm.weight"}),
    "sinks": ({"softmax_type": "learnable"}, {"sinks"}),
    "softmax without sinks": ({"softmax_type": "vanilla"}, set()),
}


@pytest.mark.parametrize("args, expected", OF_ATTENTION.values(), ids=OF_ATTENTION)
def test_the_weights_of_attention_are_those_that_the_arguments_ask_for(args, expected):
    found = names_and_keys(Family("x", bridge_provider="X", layer=attention()), **args)
    always = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
    assert {name.removeprefix("self_attn.") for name in found} - always == expected


@pytest.mark.parametrize("span, size, split_axis", [("head", 4, None), ("all_heads", 24, 0)])
def test_norms_of_query_and_key_are_of_a_head_or_of_all_heads_which_tp_splits(span, size, split_axis):
    args = ARGS | {"qk_layernorm": True, "qk_layernorm_span": span}
    [norm] = [
        chunk
        for chunk in chunks(Family("x", bridge_provider="X"), args)
        if chunk.key == "decoder.layers.self_attention.q_layernorm.weight" and chunk.layer == 1
    ]
    assert (norm.weight_shape, norm.split_axis) == ((size,), split_axis)


def test_an_mlp_without_a_gate_has_one_projection():
    found = names_and_keys(
        Family("x", bridge_provider="X", layer=plain_mlp(up="c_fc", down="c_proj")), add_mlp_bias=True
    )
    assert found == {
        "mlp.c_fc.weight": "mlp.linear_fc1.weight",
        "mlp.c_fc.bias": "mlp.linear_fc1.bias",
        "mlp.c_proj.weight": "mlp.linear_fc2.weight",
        "mlp.c_proj.bias": "mlp.linear_fc2.bias",
    }


def test_layers_that_are_not_alike_have_keys_of_their_own():
    special = layer_weight(
        "mlp.special", ("mlp.special", ("hidden",)), only_in=lambda args, layer: layer == 1
    )
    family = Family("x", bridge_provider="X", layer=(*ATTENTION, *DENSE_MLP, special))
    found = {chunk.key: chunk for chunk in chunks(family, ARGS) if chunk.layer is not None}
    assert not any(key.startswith("decoder.layers.self") for key in found)
    assert [key for key in found if key.endswith("special")] == ["decoder.layers.1.mlp.special"]
    weight = found["decoder.layers.2.self_attention.linear_qkv.weight"]
    assert (weight.global_shape, weight.offsets, weight.shape) == ((40, 12), (0, 0), (40, 12))
