"""Rotary embeddings: angles, and rotated queries and keys, as Megatron and transformers have them."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.longrope import most_generated, needs_long_factors
from megatron_star.model.rotary import (
    angles_of_values,
    cosines_and_sines,
    rotate,
    rotate_at_positions,
)
from megatron_star.model.transformer_config import StarTransformerConfig
from megatron_star.speed import cache

ROTARY = {
    "default": lambda: RotaryEmbedding(16, 1.0, rotary_base=500000, use_cpu_initialization=True),
    "half of the head": lambda: RotaryEmbedding(16, 0.5, use_cpu_initialization=True),
    "interleaved": lambda: RotaryEmbedding(16, 1.0, rotary_interleaved=True, use_cpu_initialization=True),
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
    model = torch.nn.Module()
    model.rotary_pos_emb = rotary
    model.config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    rotate_at_positions(model)
    ours = model.rotary_pos_emb
    length = ours.get_rotary_seq_len(
        SimpleNamespace(position_ids=positions, long_rows=(False,)), None, None, None, None
    )
    angles, of_windows = ours(length, packed_seq=False, cp_group=None)
    assert of_windows is angles
    table = rotary.get_emb(3000)
    table = table[0] if isinstance(table, tuple) else table
    found = angles_of_values(angles, rotary.rotary_interleaved)
    torch.testing.assert_close(found, table[positions], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_size", [16, 8], ids=["whole head", "half of it"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache_bytes", [1000, 1 << 20], ids=["in pieces", "at once"])
def test_rotation_is_megatrons_and_the_same_bits_in_pieces(
    rotary_size, dtype, interleaved, cache_bytes, monkeypatch
):
    monkeypatch.setattr(cache, "CACHE_BYTES", cache_bytes)
    use_cpu_where_cuda_is_absent()
    angles = torch.randn(5, 1, 1, rotary_size // 2)
    packed = torch.randn(5, 1, 6, 16).to(dtype)
    query = packed[:, :, 1:4]  # strided, as queries are
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=interleaved)
    expected = apply_rotary_pos_emb(
        query, angles_of_values(angles, interleaved), config, mscale=1.3, cp_group=object()
    )
    cos, sin = cosines_and_sines(angles, 1.3, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-2  # Megatron rounds the two products before their sum
    rotated = rotate(query, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(rotated, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(cache.rotate(query, cos, sin, interleaved=interleaved), rotated)


def longrope_config(original: int = 48, long: float = 2.0) -> StarTransformerConfig:
    return StarTransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        longrope_short_factors=[1.0],
        longrope_long_factors=[long],
        longrope_original_max_position_embeddings=original,
    )


@pytest.mark.parametrize(
    ("num_prompt", "num_generated", "expected"),
    [(36, 13, False), (48, 1, False), (49, 1, True), (49, 1000, True), (36, 14, None), (48, 2, None)],
)
def test_a_sequence_has_one_set_of_factors_from_its_first_token_to_its_last(
    num_prompt, num_generated, expected
):
    """None: refused, unless both sets are the same. The last generated token is not fed."""
    config = longrope_config()
    if expected is None:
        with pytest.raises(ValueError, match="would pass 48 tokens in the middle of the answer"):
            needs_long_factors(config, num_prompt, num_generated)
    else:
        assert needs_long_factors(config, num_prompt, num_generated) is expected
    assert not needs_long_factors(longrope_config(long=1.0), num_prompt, num_generated)


@pytest.mark.parametrize(("num_prompt", "expected"), [(20, 29), (48, 1), (49, 51), (10, 39)])
def test_what_nobody_asked_for_is_cut_before_the_factors_change(num_prompt, expected):
    room = most_generated(longrope_config(), num_prompt, 100 - num_prompt)
    assert room == expected
    needs_long_factors(longrope_config(), num_prompt, room)
