"""SwiGLU and RMSNorm that go over memory less often than Megatron's and torch's.

Between large matrix products they wait for memory alone, of which the ranks of one machine share the speed.
Shapes: sq tokens of this forward pass, b = 1, h hidden size, f the MLP's hidden size.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.model.norms import UnitOffsetRMSNorm
from megatron_star.speed.cache import cache_sized_pieces


def is_plain_swiglu(config: TransformerConfig) -> bool:
    """Whether dense MLPs compute silu(gate) * up (arXiv 2002.05202) and nothing else."""
    return (
        config.gated_linear_unit
        and config.activation_func == F.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
        and not config.use_te_activation_func
    )


def swiglu_in_place(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of [sq, 1, 2 * f], gate first, as a view [sq, 1, f] of it; what was in it is lost."""
    for (piece,) in cache_sized_pieces(gate_and_up):
        gate, up = piece.chunk(2, dim=-1)
        F.silu(gate, inplace=True).mul_(up)
    return gate_and_up.chunk(2, dim=-1)[0]


class SwigluInPlaceMLP(MLP):
    """Megatron's dense MLP with plain SwiGLU, for which its own makes three more tensors [sq, 1, f]."""

    swiglu_in_place = staticmethod(swiglu_in_place)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: [sq, 1, h] to the same, and the bias that is still to be added."""
        assert per_token_scale is None
        gate_and_up, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            gate_and_up = gate_and_up + bias
        return self.linear_fc2(self.swiglu_in_place(gate_and_up))


class CpuRMSNorm(torch.nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) in three passes over memory and one new tensor; torch's needs more of both.

    Only in float32 on a CPU; anything else is torch's.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[.., h] to the same."""
        if not _is_float32_on_cpu(hidden_states):
            return super().forward(hidden_states)
        return _rms_norm(hidden_states, self.weight, self.eps)


class CpuUnitOffsetRMSNorm(UnitOffsetRMSNorm):
    """The same with a scale of 1 + weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[.., h] to the same."""
        if not _is_float32_on_cpu(hidden_states):
            return super().forward(hidden_states)
        return _rms_norm(hidden_states, 1.0 + self.weight, self.eps)


def _is_float32_on_cpu(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _rms_norm(hidden_states: Tensor, scale: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
    inverse_rms = norm.square_().div_(hidden_states.size(-1)).add_(eps).rsqrt_()
    return torch.mul(hidden_states, inverse_rms).mul_(scale)
