"""Attention to keys and values in 8 bits equals attention to what is read back from them."""

import pytest
import torch

from megatron_star.attention import triton_quantised
from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.kv_formats import DTYPES
from megatron_star.attention.quantised_kv import QuantisedFormat, QuantisedTensor
from megatron_star.attention.running import RunningAttention


def as_on_a_gpu(tensor: QuantisedTensor) -> QuantisedTensor:
    """A token's heads lie side by side."""
    return QuantisedTensor(*(each.contiguous() for each in tensor))


@pytest.mark.filterwarnings("ignore:(invalid|divide).*:RuntimeWarning")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "np", "size"),
    [(1, 1, 2, 16), (63, 1, 6, 20), (700, 1, 6, 32), (1300, 5, 6, 32), (2100, 1, 4, 80)],
)
def test_attention_to_what_is_stored_is_attention_to_what_is_read_back(name, num_tokens, num_rows, np, size):
    form = QuantisedFormat(name, DTYPES[name], triton_quantised.attend, triton_quantised.MOST_ROWS)
    key, value = (torch.randn(num_tokens, 1, 2, size) * torch.rand(num_tokens, 1, 2, 1) * 3 for _ in range(2))
    kv = form.empty(num_tokens, (key, value))
    kv.write(0, key, value)
    kv.key, kv.value = as_on_a_gpu(kv.key), as_on_a_gpu(kv.value)
    query = torch.randn(num_rows, 1, np, size)
    plain = select_kernel("auto", device=query.device, dtype=query.dtype, head_size=size)
    found, expected = (RunningAttention(plain, 0.3, query) for _ in range(2))
    kv.held(num_tokens).add_to(found, [(0, num_rows)])
    expected.add([(0, num_rows)], *kv.read(slice(num_tokens)))
    torch.testing.assert_close(found.merged(), expected.merged(), atol=1e-5, rtol=1e-5)
