"""The experts of a layer, computed together instead of one after the other.

rows: [rows, h], a token for each expert that it chose, sorted by expert. E: experts that this rank holds.
f: size of an expert, on this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import HAVE_TE
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

ROWS_AT_ONCE = 256
"""Of several experts, where each is computed by itself: what lies between products stays in a CPU's cache."""
_ROW_ALIGNMENT = 16
"""Bytes, of which a row must be a multiple in a grouped product."""


class StackedExperts(SequentialMLP):
    """Megatron's experts, whose weights are views of one tensor [E, rows, columns] for each linear layer.

    They stay parameters with Megatron's names and places in a checkpoint. They are read in place; the views
    survive `.to(...)`, but not `load_state_dict(assign=True)`. For inference: no gradient reaches them.

    A product of all experts is one `torch.nn.functional.grouped_mm` on a GPU in bfloat16, which finds on the
    device how many rows an expert has; else it is a product for each expert that has rows. Only the first
    tensor-parallel rank adds the bias of the second linear layer: the outputs of the ranks are summed.

    Attributes:
        stacked: by the linear layer's name and `weight` or `bias`, the tensor of all experts.
        ignores_rows_of_no_expert: so that a caller may give more rows than experts have, where it does not
            know their number.
    """

    ignores_rows_of_no_expert = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        kinds = ("weight", "bias") if self.config.add_bias_linear else ("weight",)
        names = [f"{linear}.{kind}" for linear in ("linear_fc1", "linear_fc2") for kind in kinds]
        self.stacked = {name: self._stack(name) for name in names}

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """What each row's expert makes of it, times the expert's weight.

        Args:
            rows: [rows, h]. Those after the last expert's are of no expert.
            tokens_per_expert: [E], integers. Where they are on a GPU, nothing waits for them.
            probs: [rows], the weights.

        Returns:
            [rows, h], which says nothing for rows of no expert; and no bias, since it is in that.
        """
        if self.config.moe_apply_probs_on_input:
            assert self.config.moe_router_topk == 1, "weights are applied to the input of one expert only"
            rows, probs = _weighted(rows, probs), torch.ones_like(probs)
        if self._takes_grouped_products(rows):
            return self._together(rows, tokens_per_expert, probs), None
        return self._one_after_the_other(rows, tokens_per_expert.tolist(), probs), None

    def _takes_grouped_products(self, rows: Tensor) -> bool:
        return rows.is_cuda and self.can_group_products_of(rows.dtype)

    def can_group_products_of(self, dtype: torch.dtype) -> bool:
        """On a GPU, which then computes experts without the host's knowing how many rows they have."""
        return dtype == torch.bfloat16 and self._is_aligned()

    def _is_aligned(self) -> bool:
        weights = (self.stacked["linear_fc1.weight"], self.stacked["linear_fc2.weight"])
        return all(weight.size(-1) * weight.element_size() % _ROW_ALIGNMENT == 0 for weight in weights)

    def _together(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        if not rows.size(0):
            return torch.empty_like(rows)
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(rows.device, non_blocking=True)
        return self._mlp(rows, probs, _GroupedProducts(ends))

    def _one_after_the_other(self, rows: Tensor, tokens_per_expert: list[int], probs: Tensor) -> Tensor:
        parts, start = [], 0
        for experts in _portions(tokens_per_expert):
            end = start + sum(experts.values())
            parts.append(self._mlp(rows[start:end], probs[start:end], _SeparateProducts(experts)))
            start = end
        if start < rows.size(0) or not parts:
            parts.append(torch.zeros_like(rows[start:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mlp(self, rows: Tensor, probs: Tensor, products: "Products") -> Tensor:
        """As Megatron's MLP, in its order of roundings."""
        hidden = _weighted(_activated(self.first_linear(rows, products), self.config), probs)
        out = products.product(hidden, self.weight_of_fc2)
        if self.adds_bias_of_fc2:
            out += products.of_rows(self.stacked["linear_fc2.bias"], rows.size(0)) * probs.unsqueeze(-1)
        return out

    def first_linear(self, rows: Tensor, products: "Products") -> Tensor:
        """[rows, h] to [rows, f], or [rows, 2f] of a gate and a linear part."""
        hidden = products.product(rows, self.stacked["linear_fc1.weight"])
        if self.config.add_bias_linear:
            hidden = hidden + products.of_rows(self.stacked["linear_fc1.bias"], rows.size(0))
        return hidden

    @property
    def weight_of_fc2(self) -> Tensor:
        """[E, h, f]."""
        return self.stacked["linear_fc2.weight"]

    @property
    def adds_bias_of_fc2(self) -> bool:
        """Whether this rank does it, of those whose outputs are summed."""
        return self.config.add_bias_linear and self.tp_group.rank() == 0

    def _stack(self, name: str) -> Tensor:
        """[E, ...]: the tensor that the experts' parameters of this name become views of."""
        stacked = torch.stack([parameter.data for parameter in self._parameters_named(name)])
        self._let_view(name, stacked)
        return stacked

    def replace_stacked(self, name: str, stacked: Tensor) -> None:
        """Let the experts' parameters be views of another tensor that has the same values."""
        self.stacked[name] = stacked
        self._let_view(name, stacked)

    def _let_view(self, name: str, stacked: Tensor) -> None:
        for parameter, view in zip(self._parameters_named(name), stacked, strict=True):
            parameter.data = view

    def _parameters_named(self, name: str) -> list[torch.nn.Parameter]:
        return [expert.get_parameter(name) for expert in self.local_experts]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        """Moves and casts what the parameters are views of."""
        self.stacked = {name: fn(stacked) for name, stacked in self.stacked.items()}
        views = {
            id(parameter): view
            for name, stacked in self.stacked.items()
            for parameter, view in zip(self._parameters_named(name), stacked, strict=True)
        }
        return super()._apply(lambda t: views[id(t)] if id(t) in views else fn(t), recurse)


class Products(Protocol):
    """Products of rows with the weights of their experts."""

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[rows, columns] with [E, rows of an expert's weight, columns]."""
        ...

    def of_rows(self, bias: Tensor, num_rows: int) -> Tensor:
        """[E, n] -> [rows, n]: of each row's expert."""
        ...


class _GroupedProducts(NamedTuple):
    """Of all experts in one call, which nothing on the host waits for.

    Attributes:
        ends: [E], int32, on the device: where the rows of each expert end.
    """

    ends: Tensor

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=self.ends)

    def of_rows(self, bias: Tensor, num_rows: int) -> Tensor:
        positions = torch.arange(num_rows, dtype=torch.int32, device=self.ends.device)
        experts = torch.bucketize(positions, self.ends, out_int32=True, right=True)
        return bias[experts.clamp(max=bias.size(0) - 1)]  # of no expert: any


class _SeparateProducts(NamedTuple):
    """Of each expert by itself: how many rows each has, in order."""

    rows_of_experts: dict[int, int]

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        parts = rows.split(tuple(self.rows_of_experts.values()))
        outs = [F.linear(part, weight[e]) for e, part in zip(self.rows_of_experts, parts, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def of_rows(self, bias: Tensor, num_rows: int) -> Tensor:
        return torch.cat([bias[e].expand(count, -1) for e, count in self.rows_of_experts.items()])


def check_latent_experts(config: TransformerConfig) -> None:
    """Experts that work in a latent space need TransformerEngine.

    Raises:
        ValueError: the configuration has them, and it is not installed.
    """
    if config.moe_latent_size and not HAVE_TE:
        raise ValueError(
            f"moe_latent_size={config.moe_latent_size}: Megatron-Core projects into the experts' latent "
            "space with TransformerEngine, which is not installed: install transformer_engine[pytorch], on a "
            "machine with a GPU"
        )


def with_stacked_experts(mlp: partial[Any]) -> partial[Any]:
    """Megatron's specification of a layer of experts, computed by ours where it is one after the other."""
    submodules = mlp.keywords["submodules"]
    if submodules.experts.func is not SequentialMLP:
        return mlp
    experts = partial(StackedExperts, **submodules.experts.keywords)
    return partial(mlp.func, **mlp.keywords | {"submodules": replace(submodules, experts=experts)})


def _portions(tokens_per_expert: Sequence[int]) -> Iterator[dict[int, int]]:
    """The experts that have rows, and how many: in portions of `ROWS_AT_ONCE` rows, or of one expert."""
    portion: dict[int, int] = {}
    num_rows = 0
    for expert, count in enumerate(tokens_per_expert):
        if not count:
            continue
        if portion and num_rows + count > ROWS_AT_ONCE:
            yield portion
            portion, num_rows = {}, 0
        portion[expert] = count
        num_rows += count
    if portion:
        yield portion


def _activated(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """[rows, f], or [rows, 2f] of a gate and a linear part -> [rows, f]."""
    if not config.gated_linear_unit:
        return config.activation_func(hidden)
    gate, linear = hidden.chunk(2, dim=-1)
    if (limit := config.activation_func_clamp_value) is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(min=-limit, max=limit)
    if config.glu_linear_offset:
        linear = linear + config.glu_linear_offset
    return config.activation_func(gate) * linear


def _weighted(rows: Tensor, probs: Tensor) -> Tensor:
    """Rounded to the rows' dtype once; `probs` are float32."""
    return (rows * probs.unsqueeze(-1)).to(rows.dtype)
