"""A StarModel whose steps of few tokens read slices of the weights, and run compiled layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_star.algorithm.star_model import Integers, StarModel
from megatron_star.algorithm.step_inputs import StepInputs
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass
from megatron_star.model.expert_layer import moe_layers
from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.program_layer import ProgramKey, ProgramStep
from megatron_star.speed.sliced_linear import NO_PARTS, WeightSlicing, output_logits
from megatron_star.speed.step_graph import CudaRecorder, Run, StepGraphs

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
        captures_steps: whether whole steps are captured in CUDA graphs (`step_graph.py`).
        native_attention: of few rows on a CPU, compiled for this model (`native_attention.py`).
    """

    slicing: WeightSlicing = field(kw_only=True)
    tp_exchange: Exchange = field(kw_only=True)
    sliced_parts: frozenset[str] = NO_PARTS
    compiled_rows: tuple[int, ...] = ()
    by_columns: Mapping[WeightUse, bool] = field(default_factory=dict)
    captures_steps: bool = False
    native_attention: Callable[[Tensor, Tensor, Tensor, float], Partial] | None = None

    @cached_property
    def graphs(self) -> StepGraphs | None:
        """Of this model alone: another one, of the same modules but made by `replace`, has its own."""
        if not self.captures_steps:
            return None
        return StepGraphs(CudaRecorder(self.device), fills_up=not moe_layers(self.model))

    def step_size(self, num_rows: int, num_logit_rows: int) -> tuple[int, int]:
        """See `StarModel.step_size`: the rows of the program, or else of the graph, that would run them."""
        filled = self.graphs.filled if self.graphs else int
        return self._rows_of_program(num_rows) or filled(num_rows), filled(num_logit_rows)

    def run_step(self, inputs: StepInputs, run: Run) -> Tensor:
        """See `StarModel.run_step`."""
        return self.graphs.run(inputs, run) if self.graphs else run(inputs)

    def _rows_of_program(self, num_rows: int) -> int | None:
        return next((rows for rows in self.compiled_rows if rows >= num_rows), None)

    @torch.inference_mode()
    def forward(self, token_ids: Integers, forward_pass: ForwardPass, logit_rows: Integers = ()) -> Tensor:
        """See `StarModel.forward`."""
        if not forward_pass.is_replicated or len(token_ids) > MOST_TOKENS_OF_SLICES:
            return super().forward(token_ids, forward_pass, logit_rows)
        rows = self._rows_of_program(len(token_ids)) if forward_pass.may_be_compiled else None
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
