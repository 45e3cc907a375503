"""How evenly tokens spread over the experts of a model, counted while it runs and read when somebody asks."""

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.algorithm.star_model import StarModel
from megatron_star.parallel.control import sum_on_driver
from megatron_star.planning.expert_layers import expert_layers


@dataclass(frozen=True)
class ExpertLoad:
    """What the driver knows; a token counts once for each expert that it chose.

    Attributes:
        layers: which layers of the model have experts; the first layer is 0.
        ep_size: ranks that the experts of a layer are spread over, as many consecutive ones on each.
        counted: [expert layers, num_experts], int64, on the CPU: what the ranks have counted so far.
        total: the same, since `from_now_on`.
        recent: the same, between the last two readings that had any tokens between them.
    """

    layers: tuple[int, ...]
    ep_size: int
    counted: Tensor
    total: Tensor
    recent: Tensor

    @classmethod
    def of_model(cls, config: TransformerConfig) -> Self | None:
        """Of a model that has seen no token yet; None if it has no experts."""
        if not config.num_moe_experts:
            return None
        layers = tuple(layer for layer, has_experts in enumerate(expert_layers(config)) if has_experts)
        none = torch.zeros(len(layers), config.num_moe_experts, dtype=torch.int64)
        return cls(layers, config.expert_model_parallel_size, none, none, none)

    def read(self, counted: Tensor) -> Self:
        """With what the ranks have counted by now."""
        assert counted.shape == self.counted.shape
        recent = counted - self.counted
        if not recent.any():
            return self
        return replace(self, counted=counted, total=self.total + recent, recent=recent)

    def from_now_on(self) -> Self:
        """Without what was counted by now."""
        none = torch.zeros_like(self.counted)
        return replace(self, total=none, recent=none)

    @property
    def busiest_expert(self) -> list[float]:
        """Of each expert layer: recent tokens of its busiest expert, over the mean of its experts."""
        return _most_over_mean(self.recent)

    @property
    def busiest_rank(self) -> list[float]:
        """The same of the ranks that hold its experts: the others wait for the busiest one."""
        return _most_over_mean(self._by_rank(self.recent))

    @property
    def tokens_of_ranks(self) -> list[int]:
        """Of all layers since the start, for each rank of an expert-parallel group."""
        return self._by_rank(self.total).sum(0).tolist()

    def _by_rank(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (self.ep_size, -1)).sum(2)


def _most_over_mean(tokens: Tensor) -> list[float]:
    """Of each row [layers, parts]; 1 where there is no token."""
    mean = tokens.double().mean(1)
    return torch.where(mean > 0, tokens.amax(1) / mean, 1.0).tolist()


def gather_expert_load(star_model: StarModel, control: dist.ProcessGroup) -> Tensor:
    """What all ranks have counted so far, on the driver; called on all of them together.

    Every rank does so as part of one and the same command: it waits for others no longer than it waits for
    the next command.
    """
    return sum_on_driver(star_model.expert_load().cpu(), control)
