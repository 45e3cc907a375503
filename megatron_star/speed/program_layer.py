"""Megatron's transformer layer, which a step can run as a compiled program instead."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_star.algorithm.token_generation import TokenGenerationStep
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass, LayerAttention
from megatron_star.parallel.exchange import Exchange


class ProgramKey(NamedTuple):
    """What a program was compiled for.

    Attributes:
        num_rows: tokens of a step.
        parts: those of the model of which a CP rank reads only a slice.
        cp_size: ranks that divide them.
    """

    num_rows: int
    parts: frozenset[str]
    cp_size: int


class ProgramStep(ForwardPass):
    """A step of token generation whose layers run as programs, filled up to the rows of these programs.

    Rows behind those of the step see no key, and nobody reads what comes of them.

    Attributes:
        num_fillers: rows that stand for no token.
        num_missing: those of them that the step does not have itself.
    """

    is_replicated = True

    def __init__(self, step: TokenGenerationStep, program: ProgramKey) -> None:
        self.num_fillers = program.num_rows - step.num_rows
        self.num_missing = program.num_rows - step.num_filled_rows
        position_ids, long_rows = step.position_ids, step.long_rows
        if self.num_missing:
            position_ids = F.pad(position_ids, (0, self.num_missing))
            long_rows = (*long_rows, *(False,) * (self.num_missing if len(long_rows) > 1 else 0))
        super().__init__(position_ids, long_rows)
        self.step, self.program = step, program

    @property
    def exchange(self) -> Exchange:
        """Of the step."""
        return self.step.exchange

    def attend_locally(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """See `TokenGenerationStep.attend_locally`."""
        missing, rows = self.num_missing, self.step.num_filled_rows
        part = self.step.attend_locally(layer, query[:rows], key[:rows], value[:rows])
        if not missing:
            return part
        lse = F.pad(part.softmax_lse, (0, missing), value=-torch.inf)
        return Partial(F.pad(part.out, (0, 0, 0, missing)), lse)

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """See `ForwardPass.attend`."""
        return self.exchange.merge(self.attend_locally(layer, query, key, value))


LayerProgram = Callable[[ProgramStep, Tensor, tuple[Tensor, Tensor] | None], Tensor]
"""Of one layer: step, hidden states [sq, 1, h] and the angles of `RotaryAtPositions` to hidden states."""


class ProgrammedLayer(TransformerLayer):
    """Megatron's layer with programs; `speed/compiled_layers.py` makes them."""

    programs: dict[ProgramKey, LayerProgram]

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        inference_context: ForwardPass | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: hidden states [sq, 1, h] of this layer, and no cross-attention context.

        Here and not in `forward`, since what torch and Megatron do before that is a good part of a small
        layer's time.
        """
        program = self.programs.get(getattr(inference_context, "program", None))
        if program:
            return program(inference_context, hidden_states, rotary_pos_emb), None
        return super().__call__(
            hidden_states,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            inference_context=inference_context,
            **options,
        )
