"""The matrix product of linear layers, by the library that is fastest on this device."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""What torch's compiler makes of a linear layer on a CPU; missing in builds of torch without oneDNN."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. In float32 on a CPU many rows go to oneDNN, the library that bfloat16 goes to anyway.

    torch itself takes MKL there, which needs 5-15% longer for many rows on processors of AMD. For one row MKL
    is the faster one, of weights that lie by columns.
    """
    on_cpu = input.device.type == "cpu" and input.dtype == torch.float32
    if not on_cpu or _ONEDNN_LINEAR is None or input.numel() <= input.size(-1):
        return F.linear(input, weight, bias)
    return _ONEDNN_LINEAR(input, weight, bias, "none", [], "")
