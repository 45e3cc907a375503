"""Steps that are captured and replayed without a GPU: a replay runs again what was captured, on the CPU.

So Python does what it did for the captured step, with the inputs of a later one, as a graph does. The kernels
run in Triton's interpreter: `TRITON_INTERPRET` is 1 in the environment of these ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from gpu_ranks import Replays, load, side_by_side
from tails_ranks import as_on_a_gpu
from torch import Tensor

from megatron_star.algorithm.star_model import tail_layers_of
from megatron_star.algorithm.step_inputs import StepInputs
from megatron_star.speed import fast_model
from megatron_star.speed.step_graph import Recording

Run = Callable[[StepInputs], Tensor]


class Rerun:
    """In place of a CUDA graph."""

    def __init__(self, inputs: StepInputs, run: Run, logits: Tensor) -> None:
        self.inputs, self.run, self.logits = inputs, run, logits

    def replay(self) -> None:
        """Run again."""
        self.logits.copy_(self.run(self.inputs))

    def pool(self) -> None:
        """None."""


class RerunRecorder:
    """In place of `CudaRecorder`."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def run(self, inputs: StepInputs, run: Run) -> Tensor:
        """As it is."""
        self.logits = run(inputs)
        return self.logits

    def capture(self, inputs: StepInputs, run: Run, _: object) -> Recording:
        """Without running it: its logits have the place of those that it had."""
        logits = self.logits.clone()
        return Recording(Rerun(inputs, run, logits), inputs, logits)


def plain_and_rerun(checkpoint: str, num_sequences: int, num_contexts: int, num_steps: int) -> Replays:
    """See `gpu_ranks.side_by_side`; in float32."""
    with as_on_a_gpu(), patch.object(fast_model, "CudaRecorder", RerunRecorder):
        star_model = load(checkpoint, torch.float32, "auto", "local", cuda_graph="off")
        plain = replace(star_model, tail_layers=tail_layers_of(star_model.model))
        graphed = replace(plain, captures_steps=True)
        return side_by_side(plain, graphed, num_sequences, num_contexts, num_steps)
