"""The contract that every kernel adapter keeps, and what is built from it alone."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: [b, np, sq, hv], normalised over these keys. Zero where a row sees none of them.
        softmax_lse: [b, np, sq], float32, natural logarithm. -inf where a row sees no key.
    """

    out: Tensor
    softmax_lse: Tensor


class AttentionKernel(Protocol):
    """One attention call. Adapters own layout, LSE convention and whatever a kernel does with empty input."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        """Attend.

        Args:
            query: [sq, b, np, hn].
            key: [sk, b, ng, hn], the query's dtype. Strided input is fine.
            value: [sk, b, ng, hv], likewise. The output has its head size.
            causal: the last row sees all keys, the one before it all but the last, and so on; needs
                sq <= sk. Otherwise every row sees every key.
            softmax_scale: factor on the scores before the softmax.
            window: keys that a row sees at most, the last of those that causal leaves it: 1 or more, and
                only with causal.
        """


def empty_partial(query: Tensor, value_size: int | None = None) -> Partial:
    """The partial over no keys at all, for query [sq, b, np, hn] and values of hn, or of another size."""
    sq, b, np, hn = query.shape
    out = query.new_zeros(sq, b, np, value_size or hn).permute(1, 2, 0, 3)
    return Partial(out, query.new_full((b, np, sq), -torch.inf, dtype=torch.float32))
