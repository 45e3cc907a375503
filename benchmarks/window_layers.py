"""What window layers save: encoding a context, against a twin whose layers all have full attention.

    torchrun --nproc-per-node 2 benchmarks/window_layers.py --random-model gemma-3-270m --fp32 \\
        --num-tokens 8K --block-size 1K --output result.json

The twin has the same sizes and weights. On one rank, transformers runs the same shape with random weights of
its own, on the same threads: a forward pass that keeps the KV, and the last token's logits. Ours leaves out
what follows the last layer's keys and values.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401, I001  first, since it silences what Megatron-Core says at import
import torch
import torch.distributed as dist

from benchmarks.encoding_variants import BROADCAST, EXACT, engine_wave_tokens, variant_plan
from benchmarks.measuring import measure_rounds, median_ratio, medians, over_ranks, run_on_ranks
from benchmarks.models import SHAPES, Shape, hugging_face_model, random_star_model
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import token_costs

WINDOWS, FULL, TRANSFORMERS = "windows", "full", "transformers"
Figures = dict[str, float]


def full_twin(shape: Shape) -> Shape:
    """The same sizes with full attention in every layer."""
    return {name: value for name, value in shape.items() if not name.startswith("window_")}


def encoding(args: Namespace, star_model: StarModel, variant: str) -> Callable[[list[int]], Figures]:
    """Seconds of the slowest rank, and the KV that this rank has afterwards."""
    cp_size, costs = star_model.exchange.cp_size, token_costs(star_model.model.config)
    sizes = {"block_size": args.block_size, "wave_tokens": engine_wave_tokens(star_model.device)}

    def measure(token_ids: list[int]) -> Figures:
        plan = variant_plan(variant, len(token_ids), cp_size, costs, **sizes)
        dist.barrier()
        start = perf_counter()
        context = encode_context(star_model, token_ids, plan)
        star_model.synchronize()
        seconds = perf_counter() - start
        slowest = over_ranks(seconds, dist.ReduceOp.MAX, star_model)
        return {"encoding_s": slowest, "kv_mb": context.num_bytes / 1e6}

    return measure


def by_transformers(args: Namespace, device: torch.device) -> Callable[[list[int]], Figures]:
    """Seconds of a forward pass that keeps the KV, with the logits of the last token."""
    model = hugging_face_model(args, device)

    @torch.inference_mode()
    def measure(token_ids: list[int]) -> Figures:
        start = perf_counter()
        model(torch.tensor([token_ids], device=device), use_cache=True, logits_to_keep=1)
        return {"encoding_s": perf_counter() - start}

    return measure


def run(args: Namespace, star_model: StarModel, groups: StarGroups) -> None:
    """All rounds, and the result."""
    options = {"device": star_model.device, "dtype": star_model.model.config.params_dtype}
    twin = random_star_model(full_twin(SHAPES[args.random_model]), groups, **options)
    models = {WINDOWS: star_model, FULL: twin}
    peers = {
        f"{name}, {variant}": encoding(args, model, variant)
        for variant in (EXACT, BROADCAST)
        for name, model in models.items()
    }
    if star_model.exchange.cp_size == 1:
        peers[TRANSFORMERS] = by_transformers(args, star_model.device)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(star_model.vocab_size, (args.num_tokens,), generator=generator).tolist()
    for measure in peers.values():
        measure(token_ids[:512])
    summary = measure_rounds(
        args, lambda: {name: measure(token_ids) for name, measure in peers.items()}, summarise
    )
    if dist.get_rank() == 0:
        print(f"{'':<26}{'encoding s':>12}{'/ windows':>12}{'KV MB':>10}")
        for name, figures in summary.items():
            ratio, size = figures["to_windows"], figures.get("kv_mb", float("nan"))
            print(f"{name:<26}{figures['encoding_s']:>12.2f}{ratio:>12.2f}{size:>10.1f}")


def summarise(rounds: list[dict[str, Figures]]) -> dict[str, Figures]:
    """Of each peer: medians, and its time against that of window layers with the same plan."""
    summary = medians(rounds)
    for name, figures in summary.items():
        variant = BROADCAST if name.endswith(BROADCAST) else EXACT
        figures["to_windows"] = median_ratio(rounds, name, f"{WINDOWS}, {variant}", "encoding_s")
    return summary


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
    parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")


if __name__ == "__main__":
    run_on_ranks("window_layers.py", __doc__.splitlines()[0], add_arguments, run)
