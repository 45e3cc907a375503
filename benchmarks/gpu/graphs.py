"""The stage about CUDA graphs of whole steps: tokens as the engine generates them, plain and replayed.

Each token is fed, its logits are sampled on the device, and the sampled token comes back and is fed next. So
tails grow, and what the host does for a step is in the time. Two models of the same weights run in turn.
Their logits after equal tokens are compared, and how many steps were replayed is said: a graph that was not
used would show no difference.
"""

from dataclasses import replace

import torch
from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor

from benchmarks.decode import filled_context
from benchmarks.gpu.bench import Bench, written
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.token_generation import NewTokens, Sequence, generate_step
from megatron_star.engine.sampling import RowToSample, sample_rows
from megatron_star.speed.attach import with_step_graphs
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.step_graph import NUM_PLAIN

CASES = ((4, 1), (16, 1), (4, 8), (16, 8), (4, 3))
"""Context tokens in units, and sequences that share the context; three are filled up to four."""

NUM_WARM = NUM_PLAIN + 3
"""Tokens until one is replayed: one begins tails, some run plain, one is captured."""

NUM_TOKENS = 20
"""Replayed tokens before logits are compared."""


class Answers:
    """Sequences on one context that generate the likeliest tokens, as the engine lets them."""

    def __init__(self, star_model: FastStarModel, context: EncodedContext, num_sequences: int) -> None:
        self.star_model = star_model
        self.sequences = [Sequence(context, tail_rank=0) for _ in range(num_sequences)]
        self.tokens = list(range(1, num_sequences + 1))
        self.sampled = [RowToSample(SamplingParams(temperature=0.0), random=0.0)] * num_sequences
        self.logits: Tensor | None = None

    def step(self) -> None:
        """One more token for each."""
        fed = [
            NewTokens(sequence, [token]) for sequence, token in zip(self.sequences, self.tokens, strict=True)
        ]
        self.logits = generate_step(self.star_model, fed)
        self.tokens = [choice.token for choice in sample_rows(self.logits, self.sampled)]


def graphed(bench: Bench) -> None:
    """Each case, plain and replayed."""
    if bench.device.type != "cuda":
        bench.figures.write("graph", "graph", left_out="captured on GPUs only")
        return
    plain = replace(bench.star_model, captures_steps=False)
    for units, num_sequences in CASES:
        if bench.seconds_left() < 5:
            return
        label = f"{written(units * bench.unit)}, sequences: {num_sequences}"
        with bench.figure("graph", label) as found:
            context = filled_context(bench.star_model, units * bench.unit)
            replayed = with_step_graphs(plain, "on")
            found["plain_ms"] = 1e3 * _tpot(bench, Answers(plain, context, num_sequences))
            found["tpot_ms"] = 1e3 * _tpot(bench, Answers(replayed, context, num_sequences))
            found["replayed"] = replayed.graphs.num_replayed
            if replayed.graphs.error:
                found["why_plain"] = replayed.graphs.error
            found["difference"] = _difference(plain, replayed, context, num_sequences)
            found["reserved_gb"] = torch.cuda.memory_reserved(bench.device) / 1e9


def _tpot(bench: Bench, answers: Answers) -> float:
    return bench.seconds(answers.step, repeats=20, warm=NUM_WARM)


def _difference(
    plain: FastStarModel, replayed: FastStarModel, context: EncodedContext, num_sequences: int
) -> float:
    """Of the logits after so many equal tokens, the norm, relative."""
    expected, found = (Answers(model, context, num_sequences) for model in (plain, replayed))
    for _ in range(NUM_WARM + NUM_TOKENS):
        expected.step()
        found.step()
        found.tokens = expected.tokens
    return ((found.logits - expected.logits).norm() / expected.logits.norm()).item()
