"""Norms that Megatron's local specification has not: with a unit offset, without a bias, over all heads.

They are built as Megatron builds its own: with `config`, `hidden_size` and `eps`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.model.transformer_config import own_field


class UnitOffsetRMSNorm(torch.nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) whose scale is 1 + weight, as Gemma's is."""

    def reset_parameters(self) -> None:
        """A scale of 1."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[.., hidden_size] to the same."""
        scale = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, scale, self.eps).type_as(x)


class UnitOffsetLayerNorm(torch.nn.LayerNorm):
    """LayerNorm (arXiv 1607.06450) whose scale is 1 + weight, in the weight's dtype, as Nemotron's is."""

    def reset_parameters(self) -> None:
        """A scale of 1 and a bias of 0."""
        torch.nn.init.zeros_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[.., hidden_size] to the same."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class RMSNormAfterRotation(torch.nn.RMSNorm):
    """Of queries or keys, whose norm Megatron calls before their rotation: it does nothing then."""

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def after_rotation(self, x: Tensor) -> Tensor:
        """[.., hidden_size] to the same; `StarSelfAttention` calls it."""
        return super().forward(x)


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm of a token's queries or keys over all heads together, as OLMo 2's (arXiv 2501.00656).

    A TP rank has its heads' part of the weight; the mean of squares is that of all ranks' heads. With more
    ranks than KV heads, some ranks hold the same head: equally many each, so that the mean stays the same.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        num_heads: int,
        groups: ProcessGroupCollection,
    ) -> None:
        """hidden_size: of one head, as Megatron gives it; num_heads: on all TP ranks together."""
        super().__init__()
        self.eps, self.tp_group = eps, groups.tp
        self.num_parts = min(self.tp_group.size(), num_heads)
        self.weight = torch.nn.Parameter(torch.ones(num_heads // self.num_parts * hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[sq, b, heads of this rank, hn] to the same."""
        values = x.flatten(2).float()
        mean = values.square().mean(-1, keepdim=True)
        if self.tp_group.size() > 1:
            mean = reduce_from_tensor_model_parallel_region(mean, group=self.tp_group) / self.tp_group.size()
        return (values * (mean + self.eps).rsqrt() * self.weight.float()).type_as(x).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """As Megatron's modules: the weight's part is that of this rank's heads."""
        ranks_of_a_part = self.tp_group.size() // self.num_parts
        part, replica = divmod(self.tp_group.rank(), ranks_of_a_part)
        axis = len(sharded_offsets)
        weight = ShardedTensor.from_rank_offsets(
            f"{prefix}weight",
            self.weight,
            *sharded_offsets,
            (axis, part, self.num_parts),
            replica_id=(0, replica, metadata["dp_cp_group"].rank()),
            prepend_axis_num=axis,
        )
        return {f"{prefix}weight": weight}


def is_megatrons_norm(config: TransformerConfig) -> bool:
    """Whether Megatron's local specification can build this configuration's norms."""
    has_its_bias = config.normalization == "RMSNorm" or own_field(config, "norm_bias")
    return has_its_bias and not config.layernorm_zero_centered_gamma


def norm(config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
    """Any norm of this configuration, of torch or of ours."""
    has_offset = config.layernorm_zero_centered_gamma
    if config.normalization == "RMSNorm":
        return (UnitOffsetRMSNorm if has_offset else torch.nn.RMSNorm)(hidden_size, eps)
    layer_norm = UnitOffsetLayerNorm if has_offset else torch.nn.LayerNorm
    return layer_norm(hidden_size, eps, bias=own_field(config, "norm_bias"))


class L2Norm(torch.nn.Module):
    """Megatron's, without its `torch.compile`: layers with that cannot be recorded."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., hidden_size] to the same."""
        return F.rms_norm(x.float(), self.shape, eps=self.eps).type_as(x)


def rms_norm_after_rotation(config: TransformerConfig, hidden_size: int, eps: float) -> RMSNormAfterRotation:
    """As Megatron builds a norm."""
    return RMSNormAfterRotation(hidden_size, eps)
