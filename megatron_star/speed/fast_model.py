"""A StarModel whose steps of few tokens read slices of the weights, and run compiled layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_star.algorithm.star_model import Integers, StarModel
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass
from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.program_layer import ProgramKey, ProgramStep
from megatron_star.speed.sliced_linear import NO_PARTS, WeightSlicing, output_logits

MOST_TOKENS_OF_SLICES = 512
"""New tokens of a step that still uses slices of weights: with more, computing takes longer than reading, and
what the ranks tell each other grows with the tokens."""


class WeightUse(NamedTuple):
    """How token generation reads a weight of [num_columns, num_rows].

    Attributes:
        is_sliced: a CP rank reads a part of it.
        divides_rows: of a sliced one, which part: rows, not columns.
    """

    num_columns: int
    num_rows: int
    is_sliced: bool
    divides_rows: bool

    def __str__(self) -> str:
        part = f" sliced by {'rows' if self.divides_rows else 'columns'}" if self.is_sliced else ""
        return f"{self.num_columns} x {self.num_rows}{part}"


@dataclass(frozen=True)
class FastStarModel(StarModel):
    """Made by `with_speed`.

    Attributes:
        slicing: what the model's linear layers share.
        tp_exchange: of the TP ranks of this CP rank, in programs; elsewhere Megatron's collectives are used.
        sliced_parts: of these parts of the model (`sliced_linear.PARTS`) a CP rank reads only its slice in
            token generation; the same on all ranks.
        compiled_rows: numbers of tokens in a step for which its layers are compiled (`compiled_layers.py`),
            ascending.
        by_columns: how weights that are read so lie in memory (`layout.py`), as was measured.
        native_attention: of few rows on a CPU, compiled for this model (`native_attention.py`).
    """

    slicing: WeightSlicing = field(kw_only=True)
    tp_exchange: Exchange = field(kw_only=True)
    sliced_parts: frozenset[str] = NO_PARTS
    compiled_rows: tuple[int, ...] = ()
    by_columns: Mapping[WeightUse, bool] = field(default_factory=dict)
    native_attention: Callable[[Tensor, Tensor, Tensor, float], Partial] | None = None

    def step_size(self, num_rows: int, num_logit_rows: int) -> tuple[int, int]:
        """See `StarModel.step_size`: the rows of the program that would run them."""
        return self._rows_of_program(num_rows) or num_rows, num_logit_rows

    def _rows_of_program(self, num_rows: int) -> int | None:
        return next((rows for rows in self.compiled_rows if rows >= num_rows), None)

    @torch.inference_mode()
    def forward(self, token_ids: Integers, forward_pass: ForwardPass, logit_rows: Integers = ()) -> Tensor:
        """See `StarModel.forward`."""
        if not forward_pass.is_replicated or len(token_ids) > MOST_TOKENS_OF_SLICES:
            return super().forward(token_ids, forward_pass, logit_rows)
        rows = self._rows_of_program(len(token_ids))
        if rows is not None:
            forward_pass = ProgramStep(
                forward_pass, ProgramKey(rows, self.sliced_parts, self.exchange.cp_size)
            )
            if rows > len(token_ids):
                token_ids = F.pad(self.on_device(token_ids), (0, rows - len(token_ids)))
        with self.slicing.step(self.sliced_parts, self.exchange):
            return super().forward(token_ids, forward_pass, logit_rows)

    def output_logits(
        self, hidden_states: Tensor, output_layer: ColumnParallelLinear, output_weight: Tensor | None
    ) -> Tensor:
        """See `StarModel.output_logits`."""
        weight = output_layer.weight if output_weight is None else output_weight
        return output_logits(hidden_states, output_layer, weight, self.slicing)
