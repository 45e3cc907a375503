"""Stand-ins for torch's CUDA attention on CPU tensors, behind torch's own schemas; see kernel_stubs.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from kernel_stubs import FLASH_ATTN_3_SCHEMA, attend, check_half, flash_attn_3_fwd
from torch import Tensor


def install_torch_stubs(library: torch.library.Library) -> None:
    """Register CPU kernels for torch's CUDA attention; arguments go through torch's own schemas."""
    library.impl("_flash_attention_forward", _torch_flash, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", _torch_cudnn, "CPU")
    library.impl("_scaled_dot_product_efficient_attention", _torch_efficient, "CPU")


def _torch_flash(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    """[b, s, h, hn], without `cum_seq_q`; of its further arguments torch leaves out what has its default."""
    check_half(query, key, value)
    assert cum_seq_q is cum_seq_k is None and (max_q, max_k) == (query.size(1), key.size(1))
    window_size = (window_size_left, window_size_right)
    out, lse = attend(query, key, value, causal=is_causal, scale=scale, window_size=window_size)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, nothing


def _torch_cudnn(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    check_half(query, key, value)
    assert key.size(2) > 1, "cuDNN takes no single key"
    assert not is_causal or query.size(2) == key.size(2), "top-left"
    out, lse = _heads_first(query, key, value, is_causal, scale)
    lse = lse.unsqueeze(-1) if compute_log_sumexp else torch.empty(0)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, query.size(2), key.size(2), nothing, nothing, nothing


def _torch_efficient(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    assert query.size(1) == key.size(1), "it has no grouped heads"
    assert not is_causal or query.size(2) == key.size(2), "top-left"
    out, lse = _heads_first(query, key, value, is_causal, scale)
    rows = -(-query.size(2) // 32) * 32
    padded = lse.new_full((*lse.shape[:2], rows), torch.inf)
    padded[:, :, : query.size(2)] = lse
    return out, padded if compute_log_sumexp else torch.empty(0), torch.empty(0), torch.empty(0)


@contextmanager
def flash_attn_3_operator() -> Iterator[None]:
    """The operator that the package fa3-fwd registers, on a CPU, whether or not that has been loaded."""
    if hasattr(torch.ops.fa3_fwd, "fwd"):
        with torch.library._scoped_library("fa3_fwd", "IMPL") as library:
            library.impl("fwd", flash_attn_3_fwd, "CPU")
            yield
        return
    with torch.library._scoped_library("fa3_fwd", "DEF") as library:
        library.define(FLASH_ATTN_3_SCHEMA)
        library.impl("fwd", flash_attn_3_fwd, "CPU")
        yield


def _heads_first(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    tensors = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse = attend(*tensors, causal=causal, scale=scale, any_value_size=True)
    return out.transpose(1, 2), lse
