"""Queries scaled by their positions, so that attention stays sharp over long contexts.

scale(p) = 1 + beta * ln(1 + floor((p + offset) / floor)): Llama 4 (arXiv 2501.19399), Ministral 3.
"""

from dataclasses import dataclass
from typing import Self

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.model.transformer_config import own_field


@dataclass(frozen=True)
class QueryScale:
    """How a layer scales its queries.

    Attributes:
        floor: tokens, up to which the scale is 1.
        offset: what is added to a position, which counts from 0.
    """

    beta: float
    floor: int
    offset: int

    @classmethod
    def of_layer(cls, config: TransformerConfig, layer: int) -> Self | None:
        """Of the layer with this index; None if it scales nothing."""
        beta, layers = own_field(config, "query_scale_beta"), own_field(config, "query_scale_layers")
        if beta is None or (layers is not None and not layers[layer]):
            return None
        return cls(beta, own_field(config, "query_scale_floor"), own_field(config, "query_scale_offset"))

    def __call__(self, position_ids: Tensor) -> Tensor:
        """Positions [sq], int64, to factors [sq, 1, 1, 1], float32."""
        floors = (position_ids + self.offset) // self.floor
        return 1 + self.beta * torch.log1p(floors.to(torch.float32))[:, None, None, None]
