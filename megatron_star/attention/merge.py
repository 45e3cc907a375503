"""The only LSE arithmetic of the project (with its twin for CUDA, triton_merge.py): merging partial results.

Two parts with outputs o1, o2 and LSEs l1, l2 make o = w * o2 + (1 - w) * o1 with w = sigmoid(l2 - l1), and
l = log(exp(l1) + exp(l2)) (FlashAttention, arXiv 2205.14135, section 3.1; Star Attention, arXiv 2411.17116,
algorithm 2). Written so that it neither overflows at any gap nor makes NaN of parts that hold no key.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_star.attention.partial import Partial


def merge_partials(outs: Tensor, softmax_lses: Tensor) -> Partial:
    """Merge attention outputs that were each normalised over their own keys.

    Args:
        outs: [n, b, np, sq, hn], any float dtype. Zero where a part holds no visible key.
        softmax_lses: [n, b, np, sq], float32. -inf where a part holds no visible key.

    Returns:
        The merged part, in float32: 0 and -inf where no part holds a visible key.
    """
    softmax_lse = softmax_lses.logsumexp(0)
    weights = (softmax_lses - softmax_lse).nan_to_num_(nan=0.0, neginf=-torch.inf).exp_()
    return Partial((outs * weights.unsqueeze(-1)).sum(0), softmax_lse)


def merge_into(out: Tensor, softmax_lse: Tensor, part: Partial) -> None:
    """Merge a part over further keys into float32 out [b, np, sq, hn] and LSE [b, np, sq], in place."""
    weight = torch.sigmoid(part.softmax_lse - softmax_lse)
    weight.masked_fill_(part.softmax_lse == -torch.inf, 0.0)
    out.lerp_(part.out.to(torch.float32), weight.unsqueeze(-1))
    torch.logaddexp(softmax_lse, part.softmax_lse, out=softmax_lse)


def merge_into_on(device: torch.device) -> Callable[[Tensor, Tensor, Partial], None]:
    """`merge_into`, or on CUDA the Triton kernel that does the same in one pass over memory."""
    if device.type != "cuda":
        return merge_into
    # Triton comes with torch's CUDA builds; elsewhere it may be missing.
    return importlib.import_module("megatron_star.attention.triton_merge").merge_into


class PartialSum:
    """A running merge over packed query rows, in float32, in place."""

    def __init__(self, query: Tensor) -> None:
        """Rows of query [sq, b, np, hn], with no keys seen yet."""
        sq, b, np, hn = query.shape
        self.dtype = query.dtype
        self.num_rows, self.is_empty = sq, True
        self.merge_into = merge_into_on(query.device)
        out = torch.zeros(sq, b, np, hn, dtype=torch.float32, device=query.device)
        lse = torch.full((sq, b, np), -torch.inf, dtype=torch.float32, device=query.device)
        self.out = out.permute(1, 2, 0, 3)
        self.softmax_lse = lse.permute(1, 2, 0)

    def set_rows(self, start: int, end: int, part: Partial) -> None:
        """Start rows [start, end) with their first part: cheaper than merging it."""
        self.is_empty = False
        self.out[:, :, start:end].copy_(part.out)
        self.softmax_lse[:, :, start:end].copy_(part.softmax_lse)

    def add_rows(self, start: int, end: int, part: Partial) -> None:
        """Merge a part over further keys into rows [start, end)."""
        if self.is_empty and end - start == self.num_rows:
            self.set_rows(start, end, part)
            return
        self.is_empty = False
        self.merge_into(self.out[:, :, start:end], self.softmax_lse[:, :, start:end], part)

    def merged(self) -> Partial:
        """All rows so far, in float32."""
        return Partial(self.out, self.softmax_lse)

    def result(self) -> Tensor:
        """[sq, b, np, hn], rounded once, to the query's dtype."""
        return self.out.permute(2, 0, 1, 3).to(self.dtype)
