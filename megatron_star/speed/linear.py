"""The matrix product of linear layers, by the library that is fastest on this device."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""What torch's compiler makes of a linear layer on a CPU; missing in builds of torch without oneDNN."""

MANY_ROWS = 32


@dataclass(frozen=True)
class Linear:
    """`F.linear`. In float32 on a CPU, rows can go to oneDNN instead of MKL, which torch takes.

    Which is faster differs between makers of processors, and between few rows and many: `linear_choice.py`
    measures it. For one row MKL is the faster one everywhere, of weights that lie by columns. A slice of
    weights with gaps in memory is not for oneDNN: it takes 100 times as long as MKL.

    Attributes:
        few_by_onednn: 2 rows or more.
        many_by_onednn: MANY_ROWS or more.
    """

    few_by_onednn: bool = False
    many_by_onednn: bool = False

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Input [.., rows], weight [columns, rows], bias [columns] to [.., columns]."""
        num_rows = input.numel() // max(1, input.size(-1))
        by_onednn = self.many_by_onednn if num_rows >= MANY_ROWS else self.few_by_onednn and num_rows > 1
        if (
            by_onednn
            and _ONEDNN_LINEAR
            and _is_on_cpu_in_float32(input)
            and _has_no_gaps(weight)
            and get_proxy_mode() is None  # of a program that is being recorded, the compiler chooses
        ):
            return _ONEDNN_LINEAR(input.contiguous(), weight, bias, "none", [], "")
        if input.dim() > 2 and not input.is_contiguous():
            # As a matrix: of half of a tensor's columns, torch makes one product for each row.
            return F.linear(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])
        return F.linear(input, weight, bias)


def linear_by_onednn(input: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of contiguous float32 input [rows, k] and a weight without gaps on a CPU, by oneDNN if that
    is there.
    """
    return _ONEDNN_LINEAR(input, weight, None, "none", [], "") if _ONEDNN_LINEAR else F.linear(input, weight)


def _is_on_cpu_in_float32(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _has_no_gaps(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()
