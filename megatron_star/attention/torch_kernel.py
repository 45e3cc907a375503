"""torch's own fused attention, which computes the LSE that `scaled_dot_product_attention` throws away.

On a CPU, `_scaled_dot_product_flash_attention_for_cpu`; it is given no empty input (it dies of SIGFPE), no
head counts that do not divide (it reads past them), and float32 where the input is narrower: its bf16 path is
slow for few rows. On CUDA, `_scaled_dot_product_flash_attention` (fp16, bf16); not run on a GPU yet.
"""

import torch
from torch import Tensor

from megatron_star.attention.partial import Partial, empty_partial

FEW_ROWS = 64
"""Up to so many query rows, a group's query heads are folded into rows, so that its KV is read once."""


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, softmax_scale: float) -> Partial:
    """`AttentionKernel` on CPU and CUDA tensors."""
    sq, sk = query.size(0), key.size(0)
    assert query.size(2) % key.size(2) == 0 and not (causal and sq != sk)
    if sq == 0 or sk == 0:
        return empty_partial(query)
    if not causal and sq <= FEW_ROWS and query.size(2) > key.size(2):
        return _attend_with_folded_groups(query, key, value, softmax_scale)
    return _attend(query, key, value, causal, softmax_scale)


def _attend_with_folded_groups(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """Without a mask, rows are independent: [sq, b, ng * r, hn] is [sq * r, b, ng, hn]."""
    sq, b, np, hn = query.shape
    ng = key.size(2)
    rows = query.view(sq, b, ng, np // ng, hn).permute(0, 3, 1, 2, 4).reshape(-1, b, ng, hn)
    out, lse = _attend(rows, key, value, False, softmax_scale)
    out = out.reshape(b, ng, sq, np // ng, hn).transpose(2, 3).reshape(b, np, sq, hn)
    return Partial(out, lse.reshape(b, ng, sq, np // ng).transpose(2, 3).reshape(b, np, sq))


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Partial:
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if query.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=softmax_scale
        )
        return Partial(out, lse)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.float(), k.float(), v.float(), 0.0, causal, scale=softmax_scale
    )
    return Partial(out, lse)
