"""Attention to latents by torch's own products, on a CPU and on CUDA.

All query heads of a TP rank read the same latent: one KV head of 576 values in DeepSeek's models. No fused
kernel that we load takes such heads, but products of whole matrices suit them: few rows of many heads make a
matrix with many rows. Scores are in memory for some keys at a time. Shapes: g = b * ng KV heads, r query
heads of each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_star.attention.adapter import HALF_PRECISION, KernelInfo
from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial

SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 25}
"""In float32: 16 MB, which a CPU's caches hold a part of, and 128 MB."""
FEWEST_KEYS = 1024
"""At a time, unless there are fewer: rows are taken in tiles rather than fewer keys."""


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Partial:
    """See `Attend`; causal masks may have more keys than rows."""
    sq, b, np, _ = query.shape
    sk, most = key.size(0), SCORES_AT_ONCE[query.device.type] // (b * np)
    num_keys = min(sk, max(FEWEST_KEYS, most // sq))
    partials = PartialSum(query, value.size(3))
    for rows in _tiles(sq, max(1, most // num_keys)):
        first_hidden = rows.start + sk - sq + 1 if causal else sk
        for keys in _tiles(rows.stop + sk - sq if causal else sk, num_keys):
            hidden = _hidden(rows, keys, sk - sq, query.device) if keys.stop > first_hidden else None
            part = _attend_tile(query[rows], key[keys], value[keys], softmax_scale, hidden)
            partials.add_rows(rows.start, rows.stop, part)
    return partials.merged()


def _tiles(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _hidden(rows: slice, keys: slice, before: int, device: torch.device) -> Tensor:
    """[rows, keys], True where a row does not see a key, if the first row's own is the key `before`."""
    own = torch.arange(rows.start, rows.stop, device=device)[:, None] + before
    return torch.arange(keys.start, keys.stop, device=device) > own


def _attend_tile(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, hidden: Tensor | None
) -> Partial:
    """Query [rows, b, np, hn], key and value [keys, b, ng, ..] to [b, np, rows, hv] and LSE, in float32."""
    rows, b, np, _ = query.shape
    k, v = (tensor.permute(1, 2, 0, 3).flatten(0, 1) for tensor in (key, value))
    q = query.permute(1, 2, 0, 3).reshape(k.size(0), -1, query.size(3))
    scores = product(q, k.transpose(1, 2)).mul_(softmax_scale)
    if hidden is not None:
        scores.unflatten(1, (-1, rows)).masked_fill_(hidden, -torch.inf)
    # A row that sees none of these keys has weights of 0, and an LSE of -inf.
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = product(weights.to(value.dtype), v).div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    lse = total.log_().add_(highest)
    return Partial(out.view(b, np, rows, -1), lse.view(b, np, rows))


def product(left: Tensor, right: Tensor) -> Tensor:
    """[g, m, k] @ [g, k, n], of one dtype, in float32."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


TORCH_LATENT = KernelInfo(
    name="torch-latent",
    load=lambda: attend,
    dtypes=(torch.float32, *HALF_PRECISION),
    bottom_right=True,
    max_head_size=1 << 16,
    head_size_multiple=1,
    other_value_sizes=True,
)
"""Not to be chosen by name: `model/kernel.py` takes it wherever latents are attended to."""
