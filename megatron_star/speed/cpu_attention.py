"""Attention on a CPU where another way than torch's fused kernel in float32 is faster on this processor."""

import torch
from torch import Tensor

from megatron_star.attention import torch_cpu
from megatron_star.attention.partial import Partial
from megatron_star.speed.linear import linear
from megatron_star.speed.processor import IS_AMD, MULTIPLIES_BFLOAT16

FEW_ROWS = range(3, 6) if IS_AMD else range(0)
MANY_KEYS = range(4096, 1 << 20)
"""Where whole products are faster than the fused kernel (docs/journal.md, "Few query rows over many keys").
Their scores are in memory all at once, up to 20 MB of a head."""

ROWS_IN_BFLOAT16 = range(17) if MULTIPLIES_BFLOAT16 and not IS_AMD else range(0)
"""For which the fused kernel is faster in bfloat16 than with all keys and values widened:
docs/journal.md, "Few query rows over many keys"."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    softmax_scale: float,
    window: int | None = None,
) -> Partial:
    """See `Attend`; the same as `torch_cpu.attend`."""
    if window is not None:
        return torch_cpu.attend(query, key, value, causal, softmax_scale, window)
    if query.dtype == torch.bfloat16 and query.size(0) in ROWS_IN_BFLOAT16:
        tensors = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return Partial(*torch_cpu.FUSED(*tensors, 0.0, causal, scale=softmax_scale))
    few_rows = query.size(0) in FEW_ROWS and key.size(0) in MANY_KEYS and query.size(2) == key.size(2)
    if few_rows and not causal and query.dtype == torch.float32:
        return attend_few_rows(query, key, value, softmax_scale)
    return torch_cpu.attend(query, key, value, causal, softmax_scale)


def attend_few_rows(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """The same for few rows that see all keys, with a KV head for each query head: whole matrix products.

    The fused kernel takes 512 keys at a time, which is too small a product for so few rows.
    """
    parts = [
        _attend_heads(*(tensor[:, i].transpose(0, 1) for tensor in (query, key, value)), softmax_scale)
        for i in range(query.size(1))
    ]
    return Partial(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """[heads, rows, hn] and twice [heads, keys, hn] to [heads, rows, hn] and LSE [heads, rows]."""
    query = query * softmax_scale
    if query.size(1) < 4:
        scores = torch.bmm(query, key.transpose(1, 2))
    else:  # this way round, MKL has a better kernel
        scores = torch.bmm(key, query.transpose(1, 2)).transpose(1, 2).contiguous()
    weights = torch.softmax(scores, dim=-1)
    out = torch.stack([linear(of_head, values.t()) for of_head, values in zip(weights, value, strict=True)])
    # The largest weight is exp(largest score - LSE).
    return Partial(out, scores.amax(-1) - weights.amax(-1).log_())
