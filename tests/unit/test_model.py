"""The layer-spec swap, sizes that are refused, and rotary angles."""

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_star.model.architecture import ModelParallelSizes, transformer_config
from megatron_star.model.attention import StarCoreAttention, StarSelfAttention
from megatron_star.model.expert_layer import StarMoELayer
from megatron_star.model.latent_attention import StarMLASelfAttention
from megatron_star.model.spec import with_star_attention

ARGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "padded_vocab_size": 128,
    "position_embedding_type": "rope",
}


def test_a_layer_spec_is_copied_with_star_attention_in_it():
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    swapped = with_star_attention(spec)
    assert swapped.submodules.self_attention.module is StarSelfAttention
    assert swapped.submodules.self_attention.submodules.core_attention is StarCoreAttention
    assert swapped.submodules.mlp is spec.submodules.mlp or swapped.submodules.mlp == spec.submodules.mlp
    assert spec.submodules.self_attention.module is SelfAttention
    assert spec.submodules.self_attention.submodules.core_attention is not StarCoreAttention


def test_every_layer_of_a_block_spec_is_swapped():
    spec = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec(normalization="RMSNorm")] * 3)
    swapped = with_star_attention(spec)
    modules = [layer.submodules.self_attention.module for layer in swapped.layer_specs]
    assert modules == [StarSelfAttention] * 3


def test_every_layer_of_experts_is_swapped_and_keeps_what_it_is_made_of():
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    swapped = with_star_attention(spec).submodules.mlp
    assert swapped.func is StarMoELayer and spec.submodules.mlp.func is MoELayer
    assert swapped.keywords == spec.submodules.mlp.keywords
    assert with_star_attention(ModuleSpec(MoELayer, {"a": 1})) == ModuleSpec(StarMoELayer, {"a": 1})


def test_experts_of_another_kind_are_refused_by_their_name():
    class OtherMoELayer(MoELayer):
        pass

    with pytest.raises(ValueError, match="Star Attention does not support experts of OtherMoELayer"):
        with_star_attention([ModuleSpec(OtherMoELayer)])


def test_latent_attention_is_swapped_and_with_a_fused_projection_refused_by_its_name():
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", multi_latent_attention=True)
    assert with_star_attention(spec).submodules.self_attention.module is StarMLASelfAttention
    spec.submodules.self_attention.module = FusedMLASelfAttention
    with pytest.raises(ValueError, match="layers of FusedMLASelfAttention"):
        with_star_attention(spec)


@pytest.mark.parametrize(
    ("changes", "tp_size", "message"),
    [
        ({}, 3, "num_attention_heads 4 cannot be divided over tensor-parallel size 3"),
        ({"ffn_hidden_size": 97}, 2, "ffn_hidden_size 97"),
        ({"padded_vocab_size": 127}, 2, "padded_vocab_size 127"),
        ({"num_attention_heads": 12, "num_query_groups": 3}, 2, r"3 KV heads \(num_query_groups\)"),
    ],
)
def test_sizes_that_do_not_divide_over_tp_ranks_are_refused(changes, tp_size, message):
    with pytest.raises(ValueError, match=message):
        transformer_config(
            ARGS | changes, ModelParallelSizes(tp_size), dtype=torch.float32, device=torch.device("cpu")
        )
