"""The stages about token generation, about compiled layers, and about transformers on the same card."""

from time import perf_counter

import torch
from transformers import DynamicCache

from benchmarks.decode import cache_argument, filled_context
from benchmarks.gpu.bench import Bench, written
from benchmarks.gpu.encoding import num_parameters
from benchmarks.models import random_llama
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.model.expert_layer import moe_layers
from megatron_star.speed.compiled_layers import compile_layers
from megatron_star.speed.step_graph import NUM_PLAIN

CASES = ((4, 1), (4, 8), (16, 1), (16, 8))
"""Context tokens in units, and sequences that share the context."""

STEPS = {"repeats": 10, "warm": NUM_PLAIN + 3}
"""The first steps begin tails, and may be captured in a CUDA graph."""


def decode(bench: Bench) -> None:
    """A token of 1 and of 8 sequences after 32K and 128K tokens."""
    for units, num_sequences in CASES:
        step_figures(bench, bench.star_model, "decode", units, num_sequences)


def compiled(bench: Bench) -> None:
    """The same for one sequence with compiled layers."""
    start = perf_counter()
    star_model = compile_layers(bench.star_model, [1])
    bench.figures.write("compiled", "compiling for 1 row", s=perf_counter() - start)
    for units in (4, 16):
        step_figures(bench, star_model, "compiled", units, 1)


def step_figures(
    bench: Bench, star_model: StarModel, stage: str, units: int, num_sequences: int, name: str = ""
) -> None:
    """Seconds of a step; of its host alone, which only starts work; and bytes read in it."""
    if bench.seconds_left() < 5:
        return
    label = f"{name}{written(units * bench.unit)}, sequences: {num_sequences}"
    with bench.figure(stage, label) as found:
        context = filled_context(star_model, units * bench.unit)
        new = [(Sequence(context, 0), [1]) for _ in range(num_sequences)]
        seconds = bench.seconds(lambda: generate_step(star_model, new), **STEPS)
        start = perf_counter()
        generate_step(star_model, new)
        host_s = perf_counter() - start
        bench.synchronize()
        num_bytes = _weight_bytes(star_model, num_sequences) + context.num_bytes
        found |= {"tpot_ms": seconds * 1e3, "host_ms": host_s * 1e3, "gb_per_s": num_bytes / seconds / 1e9}
        if bench.memory_bytes_per_second:
            found["floor_ms"] = num_bytes / bench.memory_bytes_per_second * 1e3


def _weight_bytes(star_model: StarModel, num_rows: int) -> int:
    """That a step reads: all but the embedding, of which it reads a row a token, and but experts that no row
    has chosen, if all rows choose others."""
    embedding = star_model.model.embedding.word_embeddings.weight
    tied = star_model.model.share_embeddings_and_output_weights
    config = star_model.model.config
    unread = 0 if tied else embedding.numel()
    for layer in moe_layers(star_model.model):
        weights = sum(parameter.numel() for parameter in layer.experts.parameters())
        unread += int(weights * max(0, 1 - num_rows * config.moe_router_topk / config.num_moe_experts))
    return (num_parameters(star_model) - unread) * embedding.itemsize


def hf(bench: Bench) -> None:
    """transformers with SDPA, the same shape on the same card: 32K tokens in one prefill, then a token."""
    num_tokens = 4 * bench.unit
    with torch.inference_mode():
        model = random_llama(bench.shape, device=bench.device, dtype=bench.dtype)
        ids = torch.randint(bench.shape["vocab_size"], (1, num_tokens), device=bench.device)
        cache = {cache_argument(model): DynamicCache(config=model.config)}
        with bench.figure("hf", f"{written(num_tokens)} prefill") as found:
            model(ids[:, : bench.unit], use_cache=True, logits_to_keep=1)  # libraries begin
            found["s"] = bench.seconds(lambda: model(ids, **cache, use_cache=True, logits_to_keep=1))
        with bench.figure("hf", f"{written(num_tokens)}, sequences: 1") as found:
            step = bench.seconds(
                lambda: model(ids[:, :1], **cache, use_cache=True, logits_to_keep=1), **STEPS
            )
            found["tpot_ms"] = step * 1e3
