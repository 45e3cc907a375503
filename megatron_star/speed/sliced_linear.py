"""Linear layers of which a CP rank can use a slice: the ranks hold the same weights, and divide the reading.

A step of few tokens takes as long as its weights take to be read. The columns of a product can be computed by
different ranks and gathered; what goes on into a second product only (an MLP's hidden values) stays divided,
and the second one's partial sums are added up. Slices are views: no weight is moved or copied.
Shapes: sq tokens of this step, b = 1, h hidden size.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.linear import Linear

EXPERTS = "experts"
PARTS = ("qkv", "proj", "mlp", EXPERTS, "output")
NO_PARTS: frozenset[str] = frozenset()


class WeightSlicing:
    """Which weights the running step reads, whole or in slices; one object for all linear layers of a model.

    Attributes:
        layers: the linear layers that can be sliced, by part; those of experts are in `experts`.
        experts: of each layer that has some that can be sliced (`SlicedExperts`).
        parts: those of which the running step uses slices.
        exchange: of the CP ranks that divide them.
        linear: their products.
    """

    def __init__(self) -> None:
        self.layers: defaultdict[str, list[torch.nn.Module]] = defaultdict(list)
        self.experts: list[torch.nn.Module] = []
        self.parts = NO_PARTS
        self.exchange: Exchange | None = None
        self.linear = Linear()

    @contextmanager
    def step(self, parts: frozenset[str], exchange: Exchange) -> Iterator[None]:
        """Slices of these parts, for the time of a `with` block."""
        self.parts, self.exchange = parts, exchange
        try:
            yield
        finally:
            self.parts = NO_PARTS


class _Sliceable:
    """What a linear layer of Megatron becomes (`modules.py`).

    Attributes:
        slicing: of the model.
        part: of the model that it belongs to.
    """

    slicing: WeightSlicing
    part: str

    @property
    def is_sliced(self) -> bool:
        """In the running step."""
        return self.part in self.slicing.parts

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; without its copies and sums over TP ranks where there is one."""
        if args or options or self.tp_group.size() > 1:
            return super().forward(input_, *args, **options)
        if self.skip_bias_add:
            return self._forward_impl(input_, self.weight, bias=None), self.bias
        return self._forward_impl(input_, self.weight, bias=self.bias), None


class GatheredLinear(_Sliceable, ColumnParallelLinear):
    """Its columns are gathered: all ranks have all of them afterwards, however they were divided."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, bias: Tensor | None, **__: Any) -> Tensor:
        if self.is_sliced:
            return gathered_linear(input, weight, bias, self.slicing)
        return self.slicing.linear(input, weight, bias)


class DividedLinear(_Sliceable, ColumnParallelLinear):
    """Its columns stay divided: [sq, 1, columns of this rank]. Of a gated unit, each half is divided."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, bias: Tensor | None, **__: Any) -> Tensor:
        linear = self.slicing.linear
        if not self.is_sliced:
            return linear(input, weight, bias)
        weights = self._slices(weight)
        biases = [None] * len(weights) if bias is None else self._slices(bias)
        return torch.cat([linear(input, *slices) for slices in zip(weights, biases, strict=True)], dim=-1)

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; a bias that the caller adds is sliced as the output is."""
        output, bias = super().forward(*args, **options)
        if bias is not None and self.is_sliced:
            bias = torch.cat(self._slices(bias))
        return output, bias

    def _slices(self, tensor: Tensor) -> list[Tensor]:
        """This rank's rows of a weight or bias: of its gate and of its up half, where it has two."""
        halves = tensor.chunk(2 if self.config.gated_linear_unit else 1)
        return [half[even_range(half.size(0), self.slicing.exchange)] for half in halves]


class SummedLinear(_Sliceable, RowParallelLinear):
    """This rank's rows, multiplied with its share of the input; the products are added up over the ranks.

    Megatron adds up over the TP ranks afterwards, and then adds the bias, once.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, bias: Tensor | None, **__: Any) -> Tensor:
        exchange, linear = self.slicing.exchange, self.slicing.linear
        if not self.is_sliced:
            return linear(input, weight, bias)
        share = even_range(weight.size(1), exchange)
        if input.size(-1) == weight.size(1):  # not divided already by a DividedLinear
            input = input[..., share]
        total = exchange.add_up(linear(input, weight[:, share]))
        return total if bias is None else total + bias


def output_logits(
    hidden_states: Tensor, layer: ColumnParallelLinear, weight: Tensor, slicing: WeightSlicing
) -> Tensor:
    """Logits [sq, 1, vocabulary of all TP ranks] of [sq, 1, h]; of a slice, each CP rank computes its own."""
    if "output" in slicing.parts:
        logits = gathered_linear(hidden_states, weight, layer.bias, slicing)
    else:
        logits = slicing.linear(hidden_states, weight, layer.bias)
    return gather_from_tensor_model_parallel_region(logits, group=layer.tp_group)


def gathered_linear(input: Tensor, weight: Tensor, bias: Tensor | None, slicing: WeightSlicing) -> Tensor:
    """`linear(input, weight, bias)`, [.., columns], of which each rank computes some columns.

    All ranks compute equally many, so that they can be gathered: the last ones may overlap.
    """
    exchange = slicing.exchange
    num_columns, width = weight.size(0), -(-weight.size(0) // exchange.cp_size)
    starts = [min(rank * width, num_columns - width) for rank in range(exchange.cp_size)]
    mine = slice(starts[exchange.cp_rank], starts[exchange.cp_rank] + width)
    part = slicing.linear(input, weight[mine], None if bias is None else bias[mine])
    everyone = exchange.gather(part)
    fresh = [everyone[rank][..., rank * width - start :] for rank, start in enumerate(starts)]
    return torch.cat(fresh, dim=-1)


def even_range(size: int, exchange: Exchange) -> slice:
    """This rank's share of `size` rows: as even as possible, and none twice."""
    rank, num_ranks = exchange.cp_rank, exchange.cp_size
    return slice(size * rank // num_ranks, size * (rank + 1) // num_ranks)
