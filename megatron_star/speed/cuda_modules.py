"""Modules whose small operations are Triton kernels: what those of a model become on a GPU.

Triton comes with torch's CUDA builds; elsewhere it may be missing, so `modules.py` imports this where it is
needed. A program that is being recorded gets torch's operations, which its compiler fuses.
"""

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from megatron_star.model.attention import StarSelfAttention
from megatron_star.speed import elementwise, triton_elementwise


class FusedRotation(StarSelfAttention):
    """Rotates queries and keys together, in place."""

    def rotated(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `StarSelfAttention.rotated`."""
        if get_proxy_mode() is not None:
            return super().rotated(query, key, cos, sin)
        triton_elementwise.rotate_in_place(query, key, cos, sin, interleaved=self.config.rotary_interleaved)
        return query, key


class FusedSwigluMLP(elementwise.SwigluInPlaceMLP):
    """Megatron's dense MLP with plain SwiGLU, of which the activation is one operation."""

    @staticmethod
    def swiglu_in_place(gate_and_up: Tensor) -> Tensor:
        """See `elementwise.swiglu_in_place`."""
        module = elementwise if get_proxy_mode() is not None else triton_elementwise
        return module.swiglu_in_place(gate_and_up)
