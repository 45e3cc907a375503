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


def merge_outs(outs: Tensor, softmax_lses: Tensor) -> Tensor:
    """Merge attention outputs that were each normalised over their own keys.

    Args:
        outs: [n, b, np, sq, hn], float32. Zero where a part holds no visible key.
        softmax_lses: [n, b, np, sq], float32. -inf where a part holds no visible key.

    Returns:
        [b, np, sq, hn], float32: 0 where no part holds a visible key.
    """
    weights = softmax_lses.softmax(0).masked_fill_(softmax_lses == -torch.inf, 0.0)
    return (outs * weights.unsqueeze(-1)).sum(0)


def merge_parts(outs: Tensor, softmax_lses: Tensor) -> Partial:
    """`merge_outs`, with the merged LSE."""
    return Partial(merge_outs(outs, softmax_lses), softmax_lses.logsumexp(0))


def with_sinks(out: Tensor, softmax_lse: Tensor, sinks: Tensor) -> Tensor:
    """What attention over all keys, [b, np, sq, hn] and its LSE, is with a sink in each head.

    A sink is one more key, whose value is zero: it only takes weight (StreamingLLM, arXiv 2309.17453, section
    3.2; gpt-oss). So it is applied once, after the last merge.

    Args:
        sinks: [np], the scores of the sinks.
    """
    return out * torch.sigmoid(softmax_lse - sinks.to(torch.float32)[:, None]).unsqueeze(-1)


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
    """A running merge over packed query rows, in float32 from the second part on, in place."""

    def __init__(self, query: Tensor, value_size: int | None = None) -> None:
        """Rows of query [sq, b, np, hn], with no keys seen yet; values of hn, or of another size."""
        self.query, self.value_size = query, value_size or query.size(3)
        self.merge_into = merge_into_on(query.device)
        self._sum: Partial | None = None

    def set_rows(self, start: int, end: int, part: Partial) -> None:
        """Start rows [start, end) with their first part: cheaper than merging it. The part may be changed."""
        if self._sum is None and end - start == self.query.size(0):
            self._sum = part
            return
        for whole, rows in zip(self._in_float32(), part, strict=True):
            whole[:, :, start:end].copy_(rows)

    def add_rows(self, start: int, end: int, part: Partial) -> None:
        """Merge a part over further keys into rows [start, end). The part may be changed."""
        if self._sum is None and end - start == self.query.size(0):
            self.set_rows(start, end, part)
            return
        out, softmax_lse = self._in_float32()
        self.merge_into(out[:, :, start:end], softmax_lse[:, :, start:end], part)

    def so_far(self) -> Partial | None:
        """All rows; in the dtype of the only part, if there is only one that is of all of them."""
        return self._sum

    def merged(self) -> Partial:
        """All rows so far, in float32; but a lone part of all rows is as it came, and was rounded already."""
        return self._in_float32() if self._sum is None else self._sum

    def _in_float32(self) -> Partial:
        """The sum that further parts are merged into."""
        if self._sum is None:
            sq, b, np, _ = self.query.shape
            out = self.query.new_zeros(sq, b, np, self.value_size, dtype=torch.float32)
            lse = self.query.new_full((sq, b, np), -torch.inf, dtype=torch.float32)
            self._sum = Partial(out.permute(1, 2, 0, 3), lse.permute(1, 2, 0))
        elif self._sum.out.dtype != torch.float32:
            self._sum = self._sum._replace(out=self._sum.out.to(torch.float32))
        return self._sum

    def result(self) -> Tensor:
        """[sq, b, np, hv], rounded once, to the query's dtype."""
        return self.merged().out.permute(2, 0, 1, 3).to(self.query.dtype)
