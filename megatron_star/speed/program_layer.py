"""Megatron's transformer layer, which a step can run as a compiled program instead."""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_star.model.attention import StarInferenceContext

LayerProgram = Callable[[StarInferenceContext, Tensor, Tensor | None], Tensor]
"""Of one layer: step, hidden states [sq, 1, h] and Megatron's rotary angles to hidden states."""


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


class StarTransformerLayer(TransformerLayer):
    """Megatron's layer; `speed/compiled_layers.py` adds its programs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.programs: dict[ProgramKey, LayerProgram] = {}

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        inference_context: StarInferenceContext | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: hidden states [sq, 1, h] of this layer, and no cross-attention context.

        Here and not in `forward`, since what torch and Megatron do before that is a good part of a small
        layer's time.
        """
        program = self.programs.get(inference_context.program) if inference_context else None
        if program:
            return program(inference_context, hidden_states, rotary_pos_emb), None
        return super().__call__(
            hidden_states,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            inference_context=inference_context,
            **options,
        )
