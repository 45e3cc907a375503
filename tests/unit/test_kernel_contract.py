"""Every kernel keeps the contract: the CPU's own, and each adapter on a stub of its library.

The same on the libraries themselves is in `tests/gpu`.
"""

from dataclasses import replace
from unittest.mock import DEFAULT, Mock

import kernel_contract as contract
import kernel_stubs
import pytest
import reference
import torch
import torch_kernel_stubs
from kernel_contract import BANDS, EMPTY, HEADS, SHAPES, SOFTCAP, TOLERANCE, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_star.attention import torch_cpu, torch_cpu_capped
from megatron_star.attention.kernels import KERNELS

CAPPED = [name for name, info in KERNELS.items() if info.load_capped]
NAMES_AND_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
    for name, info in KERNELS.items()
    for dtype in info.dtypes
]


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    """Stubs of all libraries, and of torch's CUDA kernels."""
    kernel_stubs.install_library_stubs(monkeypatch)
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        torch_kernel_stubs.flash_attn_3_operator(),
    ):
        torch_kernel_stubs.install_torch_stubs(library)
        yield


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
@pytest.mark.parametrize(("np", "ng"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
def test_a_kernel_equals_the_reference(name, dtype, np, ng, sq, sk):
    qkv = tensors(sq, sk, np=np, ng=ng, b=2, dtype=dtype)
    contract.check_equals_reference(KERNELS[name].loaded(), *qkv, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("sq", "sk", "window"), BANDS)
def test_rows_see_the_last_keys_up_to_their_own(name, sq, sk, window):
    dtype = KERNELS[name].dtypes[0]
    qkv = tensors(sq, sk, b=2, dtype=dtype)
    contract.check_band(KERNELS[name].loaded(), *qkv, window=window, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(("sq", "sk", "window"), BANDS)
def test_a_window_wider_than_a_kernel_takes_comes_in_pieces(monkeypatch, sq, sk, window):
    kernel = KERNELS["torch-cpu"].loaded()
    narrow = replace(kernel, info=replace(kernel.info, max_window=4))
    tiles = Mock(wraps=torch_cpu._attend_in_tiles)
    monkeypatch.setattr(torch_cpu, "_attend_in_tiles", tiles)
    contract.check_band(narrow, *tensors(sq, sk), window=window, tolerance=TOLERANCE[torch.float32])
    assert tiles.called == (window in (1, 3))


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
def test_a_soft_cap_bounds_the_scores(name, sq, sk):
    dtype = KERNELS[name].dtypes[0]
    contract.check_equals_reference(
        KERNELS[name].loaded(SOFTCAP),
        *tensors(sq, sk, b=2, dtype=dtype),
        tolerance=TOLERANCE[dtype],
        softcap=SOFTCAP,
    )


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize(("sq", "sk", "window"), BANDS)
def test_a_soft_cap_comes_before_the_mask(name, sq, sk, window):
    dtype = KERNELS[name].dtypes[-1]
    contract.check_band(
        KERNELS[name].loaded(SOFTCAP),
        *tensors(sq, sk, b=2, dtype=dtype),
        window=window,
        tolerance=TOLERANCE[dtype],
        softcap=SOFTCAP,
    )


@pytest.mark.parametrize("scores_at_once", [1, 9 * 70 * 5])
@pytest.mark.parametrize(("sq", "sk", "window"), BANDS)
def test_a_cpu_takes_a_few_rows_of_capped_scores_at_a_time(monkeypatch, scores_at_once, sq, sk, window):
    """Down to one; values of another head size need no padding."""
    monkeypatch.setattr(torch_cpu_capped, "SCORES_AT_ONCE", scores_at_once)
    kernel = KERNELS["torch-cpu"].loaded(SOFTCAP)
    qkv = tensors(sq, sk, b=2, hn=16, hv=24)
    contract.check_band(kernel, *qkv, window=window, tolerance=5e-5, softcap=SOFTCAP)


@pytest.mark.parametrize("softcap", [1e-3, 50.0, 1e4])
def test_a_cpu_caps_scores_of_any_size(softcap):
    query, key, value = tensors(5, 37)
    part = KERNELS["torch-cpu"].loaded(softcap)(query * 300, key, value, causal=True, softmax_scale=1.0)
    expected = reference.attention(query * 300, key, value, causal=True, softmax_scale=1.0, softcap=softcap)
    contract.assert_same_partial(part, *expected, 2e-3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("hn", "hv"), [(24, 16), (16, 24)])
@pytest.mark.parametrize(("sq", "sk", "window"), [(1, 37, None), (5, 37, None), (70, 101, 37), (7, 1, None)])
def test_values_may_have_another_head_size(name, hn, hv, sq, sk, window):
    kernel, dtype = KERNELS[name].loaded(), KERNELS[name].dtypes[-1]
    qkv = tensors(sq, sk, hn=hn, hv=hv, b=2, dtype=dtype)
    if window:
        contract.check_band(kernel, *qkv, window=window, tolerance=TOLERANCE[dtype])
    else:
        contract.check_equals_reference(kernel, *qkv, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("sq", "sk"), EMPTY)
def test_no_rows_or_no_keys_give_zero_and_minus_infinity(name, sq, sk):
    contract.check_empty(KERNELS[name].loaded(), *tensors(sq, sk, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("sq", "sk"), [(3, 70), (70, 70)])
def test_a_kernel_takes_heads_that_lie_apart(name, sq, sk):
    qkv = tensors(sq, sk, dtype=torch.bfloat16)
    contract.check_strided(KERNELS[name].loaded(), *qkv, tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("b", [1, 3])
def test_transformer_engine_with_an_old_cudnn_gives_an_unpacked_lse(monkeypatch, b):
    monkeypatch.setattr(kernel_stubs.fused_attn_fwd, "packed_lse", False)
    qkv = tensors(17, 17, b=b, dtype=torch.float16)
    contract.check_equals_reference(KERNELS["transformer-engine"].loaded(), *qkv, tolerance=3e-3)


@pytest.mark.parametrize("name", ["torch-flash", "torch-cudnn", "torch-efficient"])
@pytest.mark.parametrize(("sq", "sk"), [(1, 37), (45, 45), (100, 41)])
def test_torchs_cuda_kernels_have_these_shapes_on_the_meta_device(name, sq, sk):
    """torch's own shape functions of these kernels, not our stubs."""
    query, key, value = tensors(sq, sk, b=2, dtype=torch.float16, device="meta")
    part = KERNELS[name].loaded()(query, key, value, causal=sq == sk, softmax_scale=1.0)
    assert part.out.shape == (2, 9, sq, 16) and part.out.dtype == torch.float16
    assert part.softmax_lse.shape == (2, 9, sq) and part.softmax_lse.dtype == torch.float32
    band = KERNELS[name].loaded()(query[:sk], key, value, causal=True, softmax_scale=1.0, window=5)
    assert band.out.shape == (2, 9, min(sq, sk), 16)


@pytest.mark.parametrize("name", ["torch-cudnn", "torch-efficient"])
def test_torchs_cuda_kernels_take_values_of_another_size_on_the_meta_device(name):
    query, key, value = tensors(5, 37, hn=16, hv=24, dtype=torch.float16, device="meta")
    part = KERNELS[name].loaded()(query, key, value, causal=False, softmax_scale=1.0)
    assert part.out.shape == (1, 9, 5, 24) and KERNELS[name].other_value_sizes


@pytest.mark.parametrize("name", KERNELS)
def test_few_rows_read_a_groups_keys_once(name, monkeypatch):
    """Where a kernel wants it, the heads of a group arrive as rows."""
    kernel = KERNELS[name].loaded()
    seen = []
    spy = replace(kernel, attend=lambda query, *rest: seen.append(query.shape) or kernel.attend(query, *rest))
    query, key, value = tensors(5, 40, dtype=torch.bfloat16)
    spy(query, key, value, causal=False, softmax_scale=1.0)
    assert seen == [(15, 1, 3, 16) if KERNELS[name].folded_rows else (5, 1, 9, 16)]


def test_grouped_heads_are_repeated_only_where_there_are_groups(monkeypatch):
    """torch-efficient has no grouped heads; repeating once would copy all keys and values all the same."""
    operator, seen = Mock(wraps=torch.ops.aten._scaled_dot_product_efficient_attention), []
    operator.side_effect = lambda q, k, v, **_: seen.append((k.data_ptr(), v.data_ptr())) or DEFAULT
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", operator)
    for ng in (9, 3):
        query, key, value = tensors(70, 70, ng=ng)
        KERNELS["torch-efficient"].loaded()(query, key, value, causal=True, softmax_scale=1.0)
        assert (seen.pop() == (key.data_ptr(), value.data_ptr())) == (ng == 9)


@pytest.mark.parametrize("name", ["torch-cudnn", "transformer-engine"])
def test_what_comes_of_a_single_key_may_be_changed_without_changing_the_value(name):
    query, key, value = tensors(1, 1, np=3, ng=3, dtype=torch.bfloat16)
    kept = value.clone()
    KERNELS[name].loaded()(query, key, value, causal=False, softmax_scale=1.0).out.zero_()
    assert torch.equal(value, kept)


def test_the_reference_runs_where_its_tensors_are():
    """On a GPU, that is; torch's tensors without values know devices that do not exist here."""
    with FakeTensorMode():
        query, key, value = (torch.empty(5, 1, heads, 16, device="cuda") for heads in (6, 2, 2))
        out, lse = reference.attention(query, key, value, causal=True, softmax_scale=1.0)
    assert out.device == lse.device == query.device
