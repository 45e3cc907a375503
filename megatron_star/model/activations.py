"""An MLP whose activation has weights."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class XIELU(torch.nn.Module):
    """xIELU (arXiv 2411.13010): its slopes are learned; checkpoints hold its two constants, too.

    All are tensors of one value, of which Megatron stacks those of all layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.beta, self.eps = torch.nn.Buffer(torch.tensor([0.5])), torch.nn.Buffer(torch.tensor([-1e-6]))

    def forward(self, x: Tensor) -> Tensor:
        """Of each value."""
        positive = F.softplus(self.alpha_p) * x * x
        negative = (self.beta + F.softplus(self.alpha_n)) * (torch.expm1(torch.min(x, self.eps)) - x)
        return torch.where(x > 0, positive, negative) + self.beta * x


class XieluMLP(MLP):
    """Megatron's dense MLP without a gate, with an `XIELU` of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.activation_func = XIELU()
