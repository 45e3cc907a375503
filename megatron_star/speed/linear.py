"""The matrix product of linear layers, by the library that is fastest on this device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from megatron_star.speed.processor import IS_AMD

_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""What torch's compiler makes of a linear layer on a CPU; missing in builds of torch without oneDNN."""

ONEDNN_IS_FASTER = IS_AMD
"""Than MKL, for many rows in float32: by 5-15% on a processor of AMD, and the other way round on one of Intel
(docs/journal.md, "Products of float32")."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. In float32 many rows go to oneDNN where that is faster than MKL, which torch takes.

    For one row MKL is the faster one, of weights that lie by columns. A slice of weights with gaps in memory
    is not for oneDNN: it takes 100 times as long as MKL.
    """
    many_rows = input.numel() > input.size(-1)
    if (
        many_rows
        and ONEDNN_IS_FASTER
        and _ONEDNN_LINEAR
        and _is_on_cpu_in_float32(input)
        and _has_no_gaps(weight)
        and get_proxy_mode() is None  # of a program that is being recorded, the compiler chooses
    ):
        return _ONEDNN_LINEAR(input.contiguous(), weight, bias, "none", [], "")
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
