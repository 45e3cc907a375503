"""Attention with a soft cap on a CPU: torch's fused kernel has none, so whole products, a few rows at a time.

Scores become softcap * tanh(score / softcap), before the mask (Gemma 2, arXiv 2408.00118, section 2). Shapes:
g = b * ng KV heads, r query heads of each.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_star.attention.partial import Partial

SCORES_AT_ONCE = 1 << 22
"""16 MB of float32."""


def load_capped(softcap: float) -> partial[Partial]:
    """The kernel; see `Attend`."""
    return partial(attend_capped, softcap=softcap)


def attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    softmax_scale: float,
    window: int | None = None,
    *,
    softcap: float,
) -> Partial:
    """See `Attend`; causal masks may have more keys than rows."""
    sq, b, np, _ = query.shape
    sk, _, ng, hv = value.shape
    q = (query.float() * (softmax_scale / softcap)).permute(1, 2, 0, 3).unflatten(1, (ng, -1)).flatten(0, 1)
    k, v = (tensor.float().permute(1, 2, 0, 3).flatten(0, 1) for tensor in (key, value))
    out, lse = q.new_empty(*q.shape[:3], hv), q.new_empty(q.shape[:3])
    num_rows = max(1, SCORES_AT_ONCE // (b * np * min(sk, window or sk)))
    for start in range(0, sq, num_rows):
        rows = slice(start, min(start + num_rows, sq))
        keys, hidden = slice(0, sk), None
        if causal:
            keys, hidden = _seen_by(rows, sk - sq, window)
        part = _attend_rows(q[:, :, rows], k[:, keys], v[:, keys], softcap, hidden)
        out[:, :, rows], lse[:, :, rows] = part
    return Partial(out.view(b, np, sq, hv), lse.view(b, np, sq))


def _seen_by(rows: slice, before: int, window: int | None) -> tuple[slice, Tensor]:
    """The keys that any of these rows sees, and [rows, keys]: True where a row does not see a key."""
    keys = slice(max(0, rows.start + before - window + 1) if window else 0, rows.stop + before)
    own = torch.arange(rows.start, rows.stop)[:, None] + before
    key = torch.arange(keys.start, keys.stop)
    return keys, (key > own) | (key <= own - (window or keys.stop))


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, softcap: float, hidden: Tensor | None) -> Partial:
    """Scaled query [g, r, rows, hn], key [g, keys, hn], value [g, keys, hv] to [g, r, rows, hv] and LSE."""
    scores = torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).tanh_().mul_(softcap)
    if hidden is not None:
        scores.unflatten(1, query.shape[1:3]).masked_fill_(hidden, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, value).div_(total)
    lse = total.log_().add_(highest).squeeze(-1)
    return Partial(out.unflatten(1, query.shape[1:3]), lse.unflatten(1, query.shape[1:3]))
