"""Experts of which a CP rank can use a slice, of each that a token chose, as `sliced_linear.py` does of MLPs.

That is possible where each CP rank has all experts. No rank then has more to read than another, and one sum
over the CP ranks gives the layer's output.
Shapes: rows are tokens of this step, one for each expert that they chose; E experts, f of an expert's MLP.
"""

import torch
from torch import Tensor

from megatron_star.model.expert_layer import StarMoELayer
from megatron_star.model.grouped_experts import Products, StackedExperts
from megatron_star.speed.sliced_linear import EXPERTS, WeightSlicing, even_range


class SlicedExperts(StackedExperts):
    """Experts whose hidden values can be divided over the CP ranks.

    Attributes:
        slicing: of the model.
    """

    slicing: WeightSlicing

    @property
    def is_sliced(self) -> bool:
        """In the running step."""
        return EXPERTS in self.slicing.parts

    def first_linear(self, rows: Tensor, products: Products) -> Tensor:
        """As of all ranks together, but this rank's columns of the gate and of the linear part."""
        if not self.is_sliced:
            return super().first_linear(rows, products)
        outs = [products.product(rows, weight) for weight in self._slices("linear_fc1.weight")]
        if self.config.add_bias_linear:
            biases = self._slices("linear_fc1.bias")
            outs = [out + products.of_rows(bias, len(out)) for out, bias in zip(outs, biases, strict=True)]
        return torch.cat(outs, dim=-1)

    def _slices(self, name: str) -> list[Tensor]:
        """[E, of this rank, ..], of what is one after the other in [E, f or 2f, ..]."""
        halves = self.stacked[name].chunk(2 if self.config.gated_linear_unit else 1, dim=1)
        return [half[:, even_range(half.size(1), self.slicing.exchange)] for half in halves]

    @property
    def weight_of_fc2(self) -> Tensor:
        """[E, h, f], or this rank's part of f."""
        weight = super().weight_of_fc2
        return weight[..., even_range(weight.size(-1), self.slicing.exchange)] if self.is_sliced else weight

    @property
    def adds_bias_of_fc2(self) -> bool:
        """Of the CP ranks whose outputs are summed, the first one does it."""
        return super().adds_bias_of_fc2 and not (self.is_sliced and self.slicing.exchange.cp_rank)


class SlicedMoELayer(StarMoELayer):
    """A layer of such experts."""

    experts: SlicedExperts

    def _added_up(self, part: Tensor) -> Tensor:
        total = super()._added_up(part)
        return self.experts.slicing.exchange.add_up(total) if self.experts.is_sliced else total
