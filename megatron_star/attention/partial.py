"""The contract that every kernel adapter keeps, and what is built from it alone."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: [b, np, sq, hn], normalised over these keys. Zero where a row sees none of them.
        softmax_lse: [b, np, sq], float32, natural logarithm. -inf where a row sees no key.
    """

    out: Tensor
    softmax_lse: Tensor


class AttentionKernel(Protocol):
    """One attention call. Adapters own layout, LSE convention and whatever a kernel does with empty input."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, softmax_scale: float
    ) -> Partial:
        """Attend.

        Args:
            query: [sq, b, np, hn].
            key, value: [sk, b, ng, hn], the query's dtype. Strided input is fine.
            causal: row i sees keys 0 .. i; needs sq == sk. Otherwise every row sees every key.
            softmax_scale: factor on the scores before the softmax.
        """


def empty_partial(query: Tensor) -> Partial:
    """The partial over no keys at all, for query [sq, b, np, hn]."""
    sq, b, np, hn = query.shape
    out = query.new_zeros(sq, b, np, hn).permute(1, 2, 0, 3)
    return Partial(out, query.new_full((b, np, sq), -torch.inf, dtype=torch.float32))
