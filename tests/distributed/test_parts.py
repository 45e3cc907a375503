"""Our modules of a layer on TP ranks, and under which keys their weights are stored."""

import pytest
import torch
from distributed import run_ranks
from parts_ranks import all_heads_norm, layer_and_its_modules, stored_tensors
from test_sliced_weights import BIASED, RANDOM
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

HEADS, HEAD_SIZE = 4, 6
LAYER = "decoder.layers."


@pytest.mark.parametrize("num_heads", [4, 2, 1], ids=["queries", "keys", "one key head"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_norm_over_all_heads_is_over_those_of_all_tp_ranks(num_heads, tp_size):
    torch.manual_seed(5)
    weight = torch.randn(num_heads * HEAD_SIZE)
    x = torch.randn(3, 1, num_heads, HEAD_SIZE) * torch.arange(1, num_heads + 1)[:, None]
    theirs = Olmo2RMSNorm(num_heads * HEAD_SIZE, eps=1e-3)
    theirs.weight.data.copy_(weight)
    expected = theirs(x.flatten(2)).view_as(x).detach()
    seen = set()
    for first, heads in run_ranks(tp_size, all_heads_norm, num_heads, weight, x):
        torch.testing.assert_close(heads, expected[:, :, first : first + heads.size(2)])
        seen |= set(range(first, first + heads.size(2)))
    assert seen == set(range(num_heads))


@pytest.mark.parametrize("name", [name for name in RANDOM if "expert" not in name])
def test_weights_are_stored_under_the_same_keys_with_the_same_shapes_at_any_tp_size(name):
    (whole,) = run_ranks(1, stored_tensors, RANDOM[name], 1)
    parts = run_ranks(2, stored_tensors, RANDOM[name], 2)
    for part in parts:
        assert {key: shapes[0] for key, shapes in part.items()} == {
            key: shapes[0] for key, shapes in whole.items()
        }
    cut = {key for key in whole if parts[0][key][1] != whole[key][1]}
    for key in cut - {"decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc1.bias"}:
        assert parts[0][key][2] != parts[1][key][2], key
    assert {key for key in whole if "layernorm" in key} & cut == (
        {f"{LAYER}self_attention.{x}_layernorm.weight" for x in "qk"} if "xielu" in name else set()
    )


def test_what_plain_megatron_has_not_is_stored_under_these_keys():
    (before_and_after,) = run_ranks(
        1, stored_tensors, RANDOM["norms before and after, some biases, xielu"], 1
    )
    (after,) = run_ranks(1, stored_tensors, RANDOM["norms after with unit offset, gated gelu"], 1)
    (parallel,) = run_ranks(1, stored_tensors, RANDOM["parallel, squared relu"], 1)
    shapes = {key.removeprefix(LAYER): shape[0] for key, shape in before_and_after.items()}
    expected = {
        "self_attn_bda.norm.weight": (2, 52),
        "mlp_bda.norm.weight": (2, 52),
        "self_attention.linear_proj.bias": (2, 52),
        "self_attention.linear_qkv.layer_norm_weight": (2, 52),
        "self_attention.q_layernorm.weight": (2, 40),
        "self_attention.k_layernorm.weight": (2, 20),
        "mlp.linear_fc1.bias": (2, 74),
        "mlp.linear_fc2.bias": (2, 52),
        "mlp.activation_func.alpha_p": (2, 1),
        "mlp.activation_func.eps": (2, 1),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert "self_attention.linear_qkv.bias" not in shapes
    assert not [key for key in after if "layer_norm" in key] and f"{LAYER}mlp_bda.norm.weight" in after
    norms = {key for key in parallel if "norm" in key}
    assert norms == {f"{LAYER}self_attention.linear_qkv.layer_norm_weight", "decoder.final_layernorm.weight"}


def test_a_parallel_layers_mlp_reads_what_its_attention_reads():
    hidden_states = torch.randn(5, 1, BIASED["hidden_size"])
    ((out, *terms),) = run_ranks(1, layer_and_its_modules, RANDOM["parallel, squared relu"], hidden_states)
    torch.testing.assert_close(out, sum(terms), atol=1e-4, rtol=1e-5)
    assert all(term.abs().max() > 0.1 for term in terms)
