"""The stage that captures a whole step of token generation in a CUDA graph: what launching it costs else.

The step is captured with its lengths, so a replay generates the same token at the same position again: it
measures what a graph would bring, and finds what in a step cannot be captured.
"""

from collections.abc import Callable

import torch
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from benchmarks.decode import filled_context
from benchmarks.gpu.bench import Bench, written
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, TokenGenerationStep, generate_step

CASES = ((4, 1), (16, 1), (4, 8))
"""Context tokens in units, and sequences that share the context."""

NUM_WARM = 3


def graphed(bench: Bench) -> None:
    """A step of each case, captured and replayed."""
    if bench.device.type != "cuda":
        bench.figures.write("graph", "graph", left_out="captured on GPUs only")
        return
    for units, num_sequences in CASES:
        label = f"{written(units * bench.unit)}, sequences: {num_sequences}"
        with bench.figure("graph", label) as found:
            context = filled_context(bench.star_model, units * bench.unit)
            new = [(Sequence(context, 0), [1]) for _ in range(num_sequences)]
            generate_step(bench.star_model, new)
            step = _fixed_step(bench.star_model, new)
            replay, logits = _captured(step)
            found["tpot_ms"] = 1e3 * bench.seconds(replay, repeats=10, warm=3)
            later = step()  # sees one more token, which is the same again
            found["difference"] = ((logits - later).norm() / later.norm()).item()
            found["kv_and_graph_gb"] = torch.cuda.memory_reserved(bench.device) / 1e9


def _fixed_step(star_model: StarModel, new: list[tuple[Sequence, list[int]]]) -> Callable[[], Tensor]:
    """One more token for these sequences, the same each time: nothing comes from the host."""
    token_ids = torch.ones(1, len(new), dtype=torch.int64, device=star_model.device)
    rows = torch.arange(len(new), device=star_model.device)
    steps = [TokenGenerationStep(star_model, new) for _ in range(NUM_WARM + 2)]

    def run() -> Tensor:
        step = steps.pop()
        with InferenceMode.active():
            return star_model.model(
                input_ids=token_ids,
                position_ids=step.position_ids[None],
                attention_mask=None,
                inference_context=step,
                runtime_gather_output=True,
                output_processor=_logits,
                output_processor_context=rows,
            )

    return run


def _logits(
    hidden_states: Tensor, output_layer: Callable, output_weight: Tensor | None, context: Tensor, **_: object
) -> Tensor:
    """GPTModel's output hook; `context` has the rows, on the device."""
    return output_layer(hidden_states[context], weight=output_weight)[0]


def _captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays the step, and where its result is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result
