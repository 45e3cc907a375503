"""Stand-ins for torch's CUDA attention on CPU tensors, behind torch's own schemas; see kernel_stubs.py."""

import torch
from kernel_stubs import attend, check_half
from torch import Tensor


def install_torch_stubs(library: torch.library.Library) -> None:
    """Register CPU kernels for torch's CUDA attention; arguments go through torch's own schemas."""
    library.impl("_scaled_dot_product_flash_attention", _torch_flash, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", _torch_cudnn, "CPU")
    library.impl("_scaled_dot_product_efficient_attention", _torch_efficient, "CPU")


def _torch_flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    check_half(query, key, value)
    out, lse = _heads_first(query, key, value, is_causal, scale)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, query.size(2), key.size(2), nothing, nothing, nothing


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
    out, lse = _heads_first(query, key, value, is_causal, scale)
    lse = lse.unsqueeze(-1) if compute_log_sumexp else torch.empty(0)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, query.size(2), key.size(2), nothing, nothing, nothing


def _torch_efficient(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    assert query.size(1) == key.size(1), "it has no grouped heads"
    out, lse = _heads_first(query, key, value, is_causal, scale)
    rows = -(-query.size(2) // 32) * 32
    padded = lse.new_full((*lse.shape[:2], rows), torch.inf)
    padded[:, :, : query.size(2)] = lse
    return out, padded if compute_log_sumexp else torch.empty(0), torch.empty(0), torch.empty(0)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = attend(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, scale=scale)
    return out.transpose(1, 2), lse
