"""Attention to contexts in 8 bits on a GPU equals attention to what is read back from them."""

import pytest
import torch

from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.kv_formats import DTYPES
from megatron_star.attention.quantised_kv import QuantisedFormat
from megatron_star.attention.running import RunningAttention


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("np", "ng", "size"), [(32, 8, 128), (9, 3, 64), (6, 2, 80)])
@pytest.mark.parametrize(
    ("num_tokens", "num_rows"), [(1, 1), (700, 1), (9_001, 8), (70_000, 1), (3_000, 100)]
)
def test_attention_to_what_is_stored_is_attention_to_what_is_read_back(
    gpu, name, dtype, np, ng, size, num_tokens, num_rows
):
    from megatron_star.attention import triton_quantised  # noqa: PLC0415 - not where torch has no Triton

    torch.manual_seed(0)
    form = QuantisedFormat(name, DTYPES[name], triton_quantised.attend, triton_quantised.MOST_ROWS)
    key, value = (torch.randn(num_tokens, 1, ng, size, device=gpu, dtype=dtype) for _ in range(2))
    kv = form.empty(num_tokens, (key, value))
    kv.write(0, key, value)
    query = torch.randn(num_rows, 1, np, size, device=gpu, dtype=dtype)
    plain = select_kernel("auto", device=gpu, dtype=dtype, head_size=size)
    found, expected = (RunningAttention(plain, size**-0.5, query) for _ in range(2))
    kv.held(num_tokens).add_to(found, [(0, num_rows)])
    expected.add([(0, num_rows)], *kv.read(slice(num_tokens)))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, twin in zip(found.merged(), expected.merged(), strict=True):
        torch.testing.assert_close(ours.float(), twin.float(), atol=tolerance, rtol=tolerance)
