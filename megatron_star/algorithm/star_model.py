"""A Megatron model together with what its attention needs; one forward pass over packed tokens."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_star.attention.partial import AttentionKernel
from megatron_star.model.attention import StarInferenceContext, StepIsComplete
from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.program_layer import ProgramKey
from megatron_star.speed.sliced_linear import NO_PARTS, output_logits


class LogitRows(NamedTuple):
    """The rows whose logits are wanted; the exchange of the ranks that divide the vocabulary, if they do."""

    rows: list[int]
    exchange: Exchange | None


@dataclass(frozen=True)
class StarModel:
    """What context encoding and token generation run on.

    Attributes:
        model: a GPTModel of `build_gpt_model` with its weights.
        vocab_size: tokens that exist; the model's vocabulary may be padded beyond it.
        sliced_parts: of these parts of the model (`sliced_linear.PARTS`) a CP rank reads only its slice in
            token generation; the same on all ranks.
        compiled_rows: numbers of tokens in a step for which its layers are compiled (`compiled_layers.py`),
            ascending.
    """

    model: torch.nn.Module
    exchange: Exchange
    kernel: AttentionKernel
    vocab_size: int
    device: torch.device
    sliced_parts: frozenset[str] = NO_PARTS
    compiled_rows: tuple[int, ...] = ()

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], step: StarInferenceContext, logit_rows: Sequence[int] = ()
    ) -> Tensor:
        """Run packed tokens through the model.

        Args:
            token_ids: one per position of `step`; none at all is fine.
            logit_rows: the rows whose logits are wanted; without any, the output layer is skipped.

        Returns:
            Logits [len(logit_rows), vocab_size], float32; none if the step was complete before them.
        """
        parts = self.sliced_parts if step.slices_weights else NO_PARTS
        slicing = self.model.weight_slicing.step(parts, self.exchange)
        if step.slices_weights:
            token_ids = self._filled_up(token_ids, step)
        with InferenceMode.active(), suppress(StepIsComplete), slicing:
            logits = self.model(
                input_ids=torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device),
                position_ids=step.position_ids[None],
                attention_mask=None,
                inference_context=step,
                runtime_gather_output=True,
                output_processor=_logits_of_rows,
                output_processor_context=LogitRows(
                    list(logit_rows), self.exchange if "output" in parts else None
                ),
            )
            return logits[:, : self.vocab_size].float()
        assert not logit_rows
        return torch.empty(0, self.vocab_size, device=self.device)

    def _filled_up(self, token_ids: Sequence[int], step: StarInferenceContext) -> Sequence[int]:
        """The tokens, and fillers so that the layers' next larger program can run them, if there is one."""
        filler = next((rows - len(token_ids) for rows in self.compiled_rows if rows >= len(token_ids)), None)
        if filler is None:
            return token_ids
        step.position_ids = F.pad(step.position_ids, (0, filler))
        step.program = ProgramKey(len(step.position_ids), self.sliced_parts, self.exchange.cp_size)
        return [*token_ids, *[0] * filler]

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _logits_of_rows(
    hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: LogitRows, **_: object
) -> Tensor:
    """GPTModel's output hook: [sq, 1, h] to [rows, padded vocabulary]."""
    if not context.rows:
        return hidden_states.new_empty(0, 0)
    weight = output_layer.weight if output_weight is None else output_weight
    return output_logits(hidden_states[context.rows], output_layer, weight, context.exchange).squeeze(1)
