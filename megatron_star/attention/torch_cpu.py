"""torch's fused attention on a CPU, with the LSE that `scaled_dot_product_attention` throws away.

The kernel dies of SIGFPE on empty input and reads past head counts that do not divide. It has grouped heads.
In half precision it is slow for many rows: it is given float32. Rows with a window are cut into tiles, whose
masks are all the same: faster than square causal pieces, whose blocks of 512 keys are half hidden
(docs/journal.md, "Windows on a CPU").
"""

import torch
from torch import Tensor

from megatron_star.attention.adapter import KernelInfo
from megatron_star.attention.band import attend_in_pieces
from megatron_star.attention.partial import Partial
from megatron_star.attention.torch_cpu_capped import load_capped

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ROWS_OF_A_TILE = 64
FEW_KEYS = 128
"""In windows of so few keys, tiles are half as large: of a tile's scores, rows / (rows + window) are hidden.
"""


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
    """Causal, in float32: rows whose window reaches back beyond the first key, then tiles of the others."""
    sq, before = query.size(0), key.size(0) - query.size(0)
    start = min(sq, max(0, window - 1 - before))
    parts = []
    if start:

        def attend_piece(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Partial:
            return attend(query, key, value, causal, softmax_scale)

        seen = before + start
        parts.append(attend_in_pieces(attend_piece, query[:start], key[:seen], value[:seen], None))
    tile = ROWS_OF_A_TILE if window > FEW_KEYS else ROWS_OF_A_TILE // 2
    for rows in (tile, (sq - start) % tile):
        end = start + (sq - start) // rows * rows if rows else start
        if start < end:
            keys = slice(start + before - window + 1, end + before)
            tiles = (query[start:end], key[keys], value[keys])
            parts.append(_attend_in_tiles(*tiles, softmax_scale, rows))
            start = end
    return Partial(*(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))


def _attend_in_tiles(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, rows: int) -> Partial:
    """Row i sees the keys i .. i + sk - sq. The tiles, of so many rows each, are a batch of the kernel."""
    hidden_before = key.size(0) - query.size(0)
    keys = rows + hidden_before
    seen = torch.ones(rows, keys, dtype=torch.bool).tril_(hidden_before).triu_()
    mask = torch.zeros(rows, keys).masked_fill_(~seen, -torch.inf)
    parts = []
    for q, k, v in zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True):
        q = q.unflatten(0, (-1, rows)).transpose(1, 2)
        k, v = (tensor.unfold(0, keys, rows).transpose(2, 3) for tensor in (k, v))  # overlapping views
        out, lse = FUSED(q, k, v, 0.0, False, attn_mask=mask, scale=softmax_scale)
        parts.append(Partial(out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)))
    return Partial(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


TORCH_CPU = KernelInfo(
    name="torch-cpu",
    load=lambda: attend,
    load_capped=load_capped,
    device_type="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    windows=True,
    max_head_size=1 << 16,
    head_size_multiple=1,
    folded_rows=64,
)
