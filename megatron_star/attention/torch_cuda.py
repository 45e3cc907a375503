"""torch's three fused attentions on CUDA, with the LSE that `scaled_dot_product_attention` throws away.

They take any strides but the last, and differ in layout, in the shape of the LSE and in grouped heads. The
first is called below its `_scaled_dot_product_flash_attention`, which does the same, but without windows.
"""

import torch
from torch import Tensor

from megatron_star.attention.adapter import ALL_ROWS, ANY_WINDOW, HALF_PRECISION, KernelInfo
from megatron_star.attention.partial import Partial


def attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    softmax_scale: float,
    window: int | None = None,
) -> Partial:
    """See `Attend`. FlashAttention 2 as torch builds it, [b, s, h, hn]: LSE [b, np, sq]."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        query.size(0),
        key.size(0),
        dropout_p=0.0,
        is_causal=causal,
        return_debug_mask=False,
        scale=softmax_scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return Partial(out.transpose(1, 2), lse)


def attend_cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Partial:
    """See `Attend`. LSE [b, np, sq, 1]."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, attn_bias=None, compute_log_sumexp=True, dropout_p=0.0, is_causal=causal, scale=softmax_scale
    )
    return Partial(out, lse.squeeze(-1))


def attend_efficient(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float
) -> Partial:
    """See `Attend`. LSE [b, np, sq rounded up to 32]; one KV head for each query head."""
    heads_per_group = query.size(2) // key.size(2)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if heads_per_group > 1:  # repeating once would copy all keys and values
        k, v = (tensor.repeat_interleave(heads_per_group, dim=1) for tensor in (k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_bias=None, compute_log_sumexp=True, dropout_p=0.0, is_causal=causal, scale=softmax_scale
    )
    return Partial(out, lse[:, :, : query.size(0)])


FLASH = KernelInfo(
    name="torch-flash", load=lambda: attend_flash, bottom_right=True, max_window=ANY_WINDOW, folded_rows=64
)
CUDNN = KernelInfo(name="torch-cudnn", load=lambda: attend_cudnn, other_value_sizes=True, min_keys=2)
EFFICIENT = KernelInfo(
    name="torch-efficient",
    load=lambda: attend_efficient,
    dtypes=(torch.float32, *HALF_PRECISION),
    min_capability=(5, 0),
    max_head_size=1 << 16,
    other_value_sizes=True,
    folded_rows=ALL_ROWS,
)
