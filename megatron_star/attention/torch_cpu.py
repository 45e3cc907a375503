"""torch's fused attention on a CPU, with the LSE that `scaled_dot_product_attention` throws away.

The kernel dies of SIGFPE on empty input and reads past head counts that do not divide. It has grouped heads.
In half precision it is slow for many rows: it is given float32. Its own causal mask hides keys in blocks of
512. So windows are tiles of few rows, each with the keys that they see and a mask: docs/journal.md, "Windows
on a CPU".
"""

import torch
from torch import Tensor

from megatron_star.attention.adapter import KernelInfo
from megatron_star.attention.partial import Partial
from megatron_star.attention.torch_cpu_capped import load_capped

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
MAX_WINDOW = 2048
"""Of wider ones, reading a tile's mask costs more than attending in pieces."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    softmax_scale: float,
    window: int | None = None,
) -> Partial:
    """See `Attend`."""
    if query.dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
    if window is not None:
        return _attend_in_window(query, key, value, softmax_scale, window)
    q, k, v = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    return Partial(*FUSED(q, k, v, 0.0, causal, scale=softmax_scale))


def _attend_in_window(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, window: int
) -> Partial:
    """Tiles whose window reaches back beyond the first key, one by one; the others; what is left of them."""
    sq, before = query.size(0), key.size(0) - query.size(0)
    size = sq if sq <= 64 else 32 if window <= 1024 else 64
    mask = _mask_of_a_tile(size, window)
    end_of_first = min(sq, -(-max(0, window - 1 - before) // size) * size)
    end_of_whole = sq - (sq - end_of_first) % size
    tiles = [(start, min(start + size, sq)) for start in range(0, end_of_first, size)]
    tiles += [(end_of_first, end_of_whole), (end_of_whole, sq)]
    parts = []
    for start, end in tiles:
        if start < end:
            first = start + before - window + 1
            rows, keys = min(size, end - start), slice(max(0, first), end + before)
            seen = mask[:rows, max(0, -first) : rows + window - 1]
            parts.append(_attend_in_tiles(query[start:end], key[keys], value[keys], softmax_scale, seen))
    return (
        parts[0]
        if len(parts) == 1
        else Partial(*(torch.cat(of_all, 2) for of_all in zip(*parts, strict=True)))
    )


def _mask_of_a_tile(rows: int, window: int) -> Tensor:
    """[rows, rows + window - 1], to be added to scores: row i sees the columns i .. i + window - 1."""
    hidden = torch.full((rows, rows + window - 1), -torch.inf)
    return hidden.triu(window).add_(hidden.tril_(-1))


def _attend_in_tiles(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, mask: Tensor
) -> Partial:
    """Tiles with the same mask, [rows, keys] of each: a batch of the kernel, not copied where b = 1."""
    b, (rows, keys) = query.size(1), mask.shape
    q = query.unflatten(0, (-1, rows)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (tensor.unfold(0, keys, rows).transpose(3, 4).flatten(0, 1) for tensor in (key, value))
    part = FUSED(q, k, v, 0.0, False, attn_mask=mask, scale=softmax_scale)
    out, lse = (tensor.unflatten(0, (-1, b)).movedim(0, 2).flatten(2, 3) for tensor in part)
    return Partial(out, lse)


TORCH_CPU = KernelInfo(
    name="torch-cpu",
    load=lambda: attend,
    load_capped=load_capped,
    device_type="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    max_window=MAX_WINDOW,
    max_head_size=1 << 16,
    head_size_multiple=1,
    folded_rows=64,
)
