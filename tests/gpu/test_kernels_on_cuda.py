"""The contract on the libraries themselves, and the Triton merge on a GPU."""

import kernel_contract as contract
import pytest
import torch
from kernel_contract import BANDS, EMPTY, SHAPES, SOFTCAP, TOLERANCE, tensors

from megatron_star.attention.kernels import KERNELS, select_kernel
from megatron_star.attention.merge import PartialSum, merge_into
from megatron_star.attention.partial import AttentionKernel, Partial

CUDA_KERNELS = [name for name, info in KERNELS.items() if info.device_type == "cuda"]
NAMES_AND_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
    for name in CUDA_KERNELS
    for dtype in KERNELS[name].dtypes
]
HEADS_AND_SIZES = [(9, 3, 64), (32, 8, 128), (8, 1, 64)]
LONG_BANDS = [(2_049, 3_001, 1_024), (2_049, 3_001, None), (5, 20_001, 4_097)]
SPLIT_KEYS = [(1, 20_001), (4, 4_097)]


def kernel_or_skip(
    name: str, dtype: torch.dtype, head_size: int, softcap: float | None = None
) -> AttentionKernel:
    """The kernel, if this machine has it; an installation that is broken fails the test."""
    device, info = torch.device("cuda", 0), KERNELS[name]
    if reason := info.obstacle(device, dtype, head_size, softcap=softcap):
        pytest.skip(f"{name}: {reason}")
    if not info.is_installed:
        pytest.skip(f"{info.distribution} is not installed")
    return select_kernel(name, device=device, dtype=dtype, head_size=head_size, softcap=softcap)


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
@pytest.mark.parametrize(("np", "ng", "hn"), HEADS_AND_SIZES)
@pytest.mark.parametrize(("sq", "sk"), SHAPES + SPLIT_KEYS)
def test_a_kernel_equals_the_reference(name, dtype, np, ng, hn, sq, sk):
    kernel = kernel_or_skip(name, dtype, hn)
    qkv = tensors(sq, sk, np=np, ng=ng, hn=hn, b=2, dtype=dtype, device="cuda")
    contract.check_equals_reference(kernel, *qkv, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize(("sq", "sk", "window"), [*BANDS, *LONG_BANDS])
def test_rows_see_the_last_keys_up_to_their_own(name, dtype, softcap, sq, sk, window):
    kernel = kernel_or_skip(name, dtype, 64, softcap)
    qkv = tensors(sq, sk, hn=64, b=2, dtype=dtype, device="cuda")
    contract.check_band(kernel, *qkv, window=window, tolerance=TOLERANCE[dtype], softcap=softcap)


@pytest.mark.parametrize(("sq", "sk", "window"), [*BANDS, *LONG_BANDS])
def test_auto_has_a_kernel_for_windows(gpu, sq, sk, window):
    chosen = {"device": gpu, "dtype": torch.bfloat16, "head_size": 64}
    kernel = select_kernel("auto", window=1 << 20, **chosen)
    qkv = tensors(sq, sk, hn=64, b=2, dtype=torch.bfloat16, device="cuda")
    contract.check_band(kernel, *qkv, window=window, tolerance=TOLERANCE[torch.bfloat16], softcap=None)


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
@pytest.mark.parametrize(("sq", "sk"), SHAPES + SPLIT_KEYS)
def test_a_soft_cap_bounds_the_scores(name, dtype, sq, sk):
    kernel = kernel_or_skip(name, dtype, 64, SOFTCAP)
    qkv = tensors(sq, sk, hn=64, b=2, dtype=dtype, device="cuda")
    contract.check_equals_reference(kernel, *qkv, tolerance=TOLERANCE[dtype], softcap=SOFTCAP)


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize(("hn", "hv"), [(96, 64), (64, 96)])
@pytest.mark.parametrize(("sq", "sk", "window"), [(1, 37, None), (70, 101, None), (70, 101, 37)])
def test_values_may_have_another_head_size(name, hn, hv, sq, sk, window):
    kernel = kernel_or_skip(name, torch.bfloat16, max(hn, hv))
    qkv = tensors(sq, sk, hn=hn, hv=hv, b=2, dtype=torch.bfloat16, device="cuda")
    contract.check_band(kernel, *qkv, window=window, tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize(("sq", "sk"), EMPTY)
def test_no_rows_or_no_keys_give_zero_and_minus_infinity(name, sq, sk):
    kernel = kernel_or_skip(name, torch.bfloat16, 64)
    contract.check_empty(kernel, *tensors(sq, sk, hn=64, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize(("sq", "sk"), [(3, 70), (70, 70)])
def test_a_kernel_takes_heads_that_lie_apart(name, sq, sk):
    kernel = kernel_or_skip(name, torch.bfloat16, 64)
    qkv = tensors(sq, sk, hn=64, dtype=torch.bfloat16, device="cuda")
    contract.check_strided(kernel, *qkv, tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sq", "hn"), [(1, 64), (37, 80), (4_097, 128)])
def test_the_triton_merge_equals_torchs(gpu, dtype, sq, hn):
    generator = torch.Generator(device=gpu).manual_seed(0)
    new = Partial(
        torch.randn(1, 9, sq, hn, generator=generator, device=gpu).to(dtype),
        torch.randn(1, 9, sq, generator=generator, device=gpu) * 100,
    )
    new.softmax_lse[:, 0] = -torch.inf
    new.out[:, 0] = 0
    running = PartialSum(torch.zeros(sq, 1, 9, hn, device=gpu))
    expected = PartialSum(torch.zeros(sq, 1, 9, hn, device=gpu)).merged()
    assert running.merge_into is not merge_into
    for shift in (0.0, 1.0, -100.0):
        part = Partial(new.out + shift, new.softmax_lse * 0.5 + shift)
        running.add_rows(0, sq, part)
        merge_into(*expected, part)
    torch.testing.assert_close(running.merged(), expected, atol=1e-5, rtol=1e-5)
