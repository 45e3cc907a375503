"""The layer-spec swap, sizes that are refused, and rotary angles."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_star.model.architecture import transformer_config
from megatron_star.model.attention import ForwardPass, StarCoreAttention, StarSelfAttention
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.rotary import RotaryAtPositions, rotate
from megatron_star.model.spec import with_star_attention
from megatron_star.speed import cache

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


def test_an_attention_of_another_kind_is_refused_by_its_name():
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", multi_latent_attention=True)
    with pytest.raises(ValueError, match="MLASelfAttention"):
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
        transformer_config(ARGS | changes, tp_size=tp_size, dtype=torch.float32, device=torch.device("cpu"))


ROTARY = {
    "default": lambda: RotaryEmbedding(16, 1.0, rotary_base=500000, use_cpu_initialization=True),
    "half of the head": lambda: RotaryEmbedding(16, 0.5, use_cpu_initialization=True),
    "interpolated": lambda: RotaryEmbedding(
        16, 1.0, seq_len_interpolation_factor=4.0, use_cpu_initialization=True
    ),
    "llama 3 scaled": lambda: RotaryEmbedding(16, 1.0, rope_scaling=True, use_cpu_initialization=True),
    "yarn": lambda: YarnRotaryEmbedding(16, scaling_factor=4.0, use_cpu_initialization=True),
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_angles_at_positions_are_rows_of_megatrons_table(kind):
    use_cpu_where_cuda_is_absent()
    rotary = ROTARY[kind]()
    positions = torch.tensor([0, 5, 3, 2999, 1])
    ours = RotaryAtPositions(rotary)
    length = ours.get_rotary_seq_len(SimpleNamespace(position_ids=positions), None, None, None, None)
    angles, table = ours(length, packed_seq=False, cp_group=None), rotary.get_emb(3000)
    if isinstance(table, tuple):
        assert angles[1] == table[1]
        angles, table = angles[0], table[0]
    torch.testing.assert_close(angles, table[positions], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_size", [16, 8], ids=["whole head", "half of it"])
@pytest.mark.parametrize("cache_bytes", [1000, 1 << 20], ids=["in pieces", "at once"])
def test_rotation_is_megatrons_and_the_same_bits_in_pieces(rotary_size, dtype, cache_bytes, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BYTES", cache_bytes)
    use_cpu_where_cuda_is_absent()
    angles = torch.randn(5, 1, 1, rotary_size // 2).repeat(1, 1, 1, 2)
    packed = torch.randn(5, 1, 6, 16).to(dtype)
    query = packed[:, :, 1:4]  # strided, as queries are
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False)
    expected = apply_rotary_pos_emb(query, angles, config, mscale=1.3, cp_group=object())
    cos, sin = ForwardPass.rotation(SimpleNamespace(_rotation=None), angles, 1.3, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-2  # Megatron rounds the two products before their sum
    torch.testing.assert_close(rotate(query, cos, sin), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(cache.rotate(query, cos, sin), rotate(query, cos, sin))
