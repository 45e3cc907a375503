"""Two kernels as one: another one for windows, where the one for everything else has none of its own."""

from dataclasses import dataclass

from torch import Tensor

from megatron_star.attention.adapter import LoadedKernel
from megatron_star.attention.partial import Partial


@dataclass(frozen=True)
class WindowKernel:
    """
    Attributes:
        full: for all calls without a window, and for those of one row, whose window is a piece of the keys.
        windows: for the others.
    """

    full: LoadedKernel
    windows: LoadedKernel

    @property
    def name(self) -> str:
        """Of the kernel for full attention, which was chosen."""
        return self.full.name

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
        """See `AttentionKernel`."""
        kernel = self.full if window is None or query.size(0) == 1 else self.windows
        return kernel(query, key, value, causal=causal, softmax_scale=softmax_scale, window=window)
