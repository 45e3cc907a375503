"""SwiGLU and RMSNorm that go over memory less often, beside the arithmetic that they stand for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_star.model.norms import UnitOffsetRMSNorm
from megatron_star.speed import cache
from megatron_star.speed.cache import cache_sized_pieces
from megatron_star.speed.elementwise import CpuRMSNorm, CpuUnitOffsetRMSNorm, is_plain_swiglu, swiglu_in_place

CONFIG = TransformerConfig(
    num_layers=1,
    hidden_size=40,
    num_attention_heads=4,
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=F.silu,
    add_bias_linear=False,
    persist_layer_norm=False,
    bias_dropout_fusion=False,
)


@pytest.fixture(params=[1, 5000, 1 << 20], ids=["less than a row", "some rows", "everything"])
def cache_bytes(request, monkeypatch) -> int:
    monkeypatch.setattr(cache, "CACHE_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_pieces_are_views_of_all_rows_that_fit_the_cache(cache_bytes, num_rows):
    first, second = torch.zeros(num_rows, 1, 40), torch.zeros(num_rows, 1, 7)
    for number, (of_first, of_second) in enumerate(cache_sized_pieces(first, second), start=1):
        assert len(of_first) == len(of_second) <= max(1, cache_bytes // (4 * 47))
        of_first += number
        of_second += number
    numbers = first[:, 0, 0].tolist()
    assert numbers == sorted(numbers) and all(numbers)
    assert torch.equal(first, first[:, :, :1].expand_as(first))
    assert torch.equal(second, first[:, :, :1].expand_as(second))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_swiglu_in_place_is_the_gates_silu_times_up(cache_bytes, num_rows, dtype, tolerance):
    gate_and_up = torch.randn(num_rows, 1, 48, dtype=dtype)
    gate, up = gate_and_up.double().chunk(2, dim=-1)
    out = swiglu_in_place(gate_and_up)
    torch.testing.assert_close(out.double(), gate * gate.sigmoid() * up, atol=tolerance, rtol=tolerance)
    assert out.data_ptr() == gate_and_up.data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        {"gated_linear_unit": False},
        {"activation_func": F.gelu},
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
        {"use_te_activation_func": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_any_other_activation_stays_megatrons(other):
    assert is_plain_swiglu(CONFIG)
    assert not is_plain_swiglu(replace(CONFIG, **other))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(0, 1, 40), (1, 1, 40), (37, 1, 40), (5, 1, 3, 40)], ids=str)
@pytest.mark.parametrize(("norm_class", "offset"), [(CpuRMSNorm, 0.0), (CpuUnitOffsetRMSNorm, 1.0)])
def test_rms_norm_divides_by_the_root_mean_square(norm_class, offset, shape, scale):
    norm = norm_class(40, eps=1e-5)
    norm.weight.data.uniform_(0.5, 2.0)
    inputs = scale * torch.randn(shape)
    before, exact = inputs.clone(), inputs.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (norm.weight.double() + offset)
    with torch.inference_mode():
        torch.testing.assert_close(norm(inputs).double(), expected, atol=1e-6, rtol=2e-6)
    assert torch.equal(inputs, before)


def test_rms_norm_in_bfloat16_is_torchs():
    inputs = torch.randn(7, 1, 40, dtype=torch.bfloat16)
    ours, torchs = CpuRMSNorm(40, eps=1e-5).bfloat16(), WrappedTorchNorm(CONFIG, 40).bfloat16()
    assert torch.equal(ours(inputs), torchs(inputs))
    ours, slow = (made(40, eps=1e-5).bfloat16() for made in (CpuUnitOffsetRMSNorm, UnitOffsetRMSNorm))
    assert torch.equal(ours(inputs), slow(inputs))
