"""Context encoding, side by side: exact, star with the anchor recomputed, star with the anchor broadcast.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/context_encoding.py --load .demo/megatron \\
        --num-tokens 8K --block-size 1K --repeats 3 --output result.json

On GPUs, without a checkpoint: `--load - --random-model llama-3.1-8b --bf16 --num-tokens 128K`.

All variants run in one process group, one after the other, `--repeats` times; figures are medians, and ratios
are medians of the ratios within a round, so that a machine that becomes slower in between does not bend them.
"""

import statistics
import sys
from argparse import Namespace
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.measuring import median_ratio, over_ranks, run_on_ranks, write_result
from launch.arguments import ArgumentParser, token_count
from megatron_star.config import StarConfig
from megatron_star.cost_model import choose_plan, token_costs
from megatron_star.inference.context_encoding import encode_context
from megatron_star.inference.star_model import StarModel
from megatron_star.inference.token_generation import Sequence, generate_step
from megatron_star.parallel.groups import StarGroups

DECODE_STEPS = 8


def variants(block_size: int) -> dict[str, StarConfig]:
    """What is compared, by name."""
    return {
        "exact": StarConfig(mode="exact"),
        "recompute": StarConfig(block_size=block_size, anchor="recompute"),
        "broadcast": StarConfig(block_size=block_size),
    }


def measure(star_model: StarModel, token_ids: list[int], config: StarConfig) -> dict[str, float]:
    """One encoding and a few tokens after it.

    Returns:
        Seconds until the slowest rank has encoded the context, bytes that a CP group sent for it, TFLOP/s of
        the slowest CP rank (by the cost model), and seconds of a token after it.
    """
    exchange, costs = star_model.exchange, token_costs(star_model.model.config)
    _, plan = choose_plan(len(token_ids), exchange.cp_size, config, costs)
    exchange.counts.clear()
    dist.barrier()
    start = perf_counter()
    context = encode_context(star_model, token_ids, plan)
    star_model.synchronize()
    seconds = over_ranks(perf_counter() - start, dist.ReduceOp.MAX, star_model)
    sent = over_ranks(exchange.counts["broadcast_bytes"], dist.ReduceOp.SUM, star_model)
    return {
        "seconds": seconds,
        "bytes_sent": sent / star_model.model.config.tensor_model_parallel_size,
        "tflops_per_s": plan.cost(costs) / seconds / 1e12,
        "decode_s": _decode_seconds(star_model, Sequence(context, tail_rank=0)),
    }


def _decode_seconds(star_model: StarModel, sequence: Sequence) -> float:
    generate_step(star_model, [(sequence, [1] * 8)])
    star_model.synchronize()
    start = perf_counter()
    for _ in range(DECODE_STEPS):
        generate_step(star_model, [(sequence, [1])])
    star_model.synchronize()
    return over_ranks((perf_counter() - start) / DECODE_STEPS, dist.ReduceOp.MAX, star_model)


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians by variant; `speedup` is how many times faster the broadcast is than the variant."""
    summary = {}
    for name in rounds[0]:
        summary[name] = {
            "seconds": statistics.median(r[name]["seconds"] for r in rounds),
            "bytes_sent": rounds[0][name]["bytes_sent"],
            "tflops_per_s": statistics.median(r[name]["tflops_per_s"] for r in rounds),
            "decode_s": statistics.median(r[name]["decode_s"] for r in rounds),
            "broadcast_is_faster_by": median_ratio(rounds, name, "broadcast", "seconds"),
        }
    return summary


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """For people."""
    titles = ("seconds", "/ broadcast", "TFLOP/s a rank", "MB sent", "decode ms")
    print(f"{'variant':<12}" + "".join(f"{title:>15}" for title in titles))
    for name, figures in summary.items():
        cells = (
            figures["seconds"],
            figures["broadcast_is_faster_by"],
            figures["tflops_per_s"],
            figures["bytes_sent"] / 1e6,
            figures["decode_s"] * 1e3,
        )
        print(f"{name:<12}" + "".join(f"{cell:>15.3f}" for cell in cells))


def run(args: Namespace, star_model: StarModel, _: StarGroups) -> None:
    """All rounds, and the result on rank 0."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(star_model.vocab_size, (args.num_tokens,), generator=generator).tolist()
    measure(star_model, token_ids[: args.num_tokens // 8], StarConfig(block_size=args.block_size))
    rounds = [
        {name: measure(star_model, token_ids, config) for name, config in variants(args.block_size).items()}
        for _ in range(args.repeats)
    ]
    if dist.get_rank():
        return
    summary = summarise(rounds)
    print_table(summary)
    write_result(args.output, summary, rounds)


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
    parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")


if __name__ == "__main__":
    run_on_ranks("context_encoding.py", __doc__.splitlines()[0], add_arguments, run)
