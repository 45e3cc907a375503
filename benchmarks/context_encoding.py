"""Context encoding, side by side: exact, star with the anchor recomputed, star with the anchor broadcast.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/context_encoding.py --load .demo/megatron \\
        --num-tokens 8K --block-size 1K --repeats 3 --output result.json

On GPUs, without a checkpoint: `--load - --random-model llama-3.1-8b --bf16 --num-tokens 128K`.

All variants run in one process group, one after the other, `--repeats` times; figures are medians, and ratios
are medians of the ratios within a round, so that a machine that becomes slower in between does not bend them.
"""

import json
import platform
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.models import add_random_model_argument, measured_model
from launch.arguments import ArgumentParser, add_model_arguments, token_count
from launch.environment import read_environment
from launch.session import exit_on_errors, process_groups
from megatron_star.config import StarConfig
from megatron_star.cost_model import choose_plan, token_costs
from megatron_star.inference.context_encoding import encode_context
from megatron_star.inference.star_model import StarModel
from megatron_star.inference.token_generation import Sequence, generate_step

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
    seconds = _over_ranks(perf_counter() - start, dist.ReduceOp.MAX, star_model)
    sent = _over_ranks(exchange.counts["broadcast_bytes"], dist.ReduceOp.SUM, star_model)
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
    return _over_ranks((perf_counter() - start) / DECODE_STEPS, dist.ReduceOp.MAX, star_model)


def _over_ranks(value: float, operation: dist.ReduceOp, star_model: StarModel) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=star_model.device)
    dist.all_reduce(tensor, operation)
    return tensor.item()


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians by variant; `speedup` is how many times faster the broadcast is than the variant."""
    summary = {}
    for name in rounds[0]:
        ratios = [r[name]["seconds"] / r["broadcast"]["seconds"] for r in rounds]
        summary[name] = {
            "seconds": statistics.median(r[name]["seconds"] for r in rounds),
            "bytes_sent": rounds[0][name]["bytes_sent"],
            "tflops_per_s": statistics.median(r[name]["tflops_per_s"] for r in rounds),
            "decode_s": statistics.median(r[name]["decode_s"] for r in rounds),
            "broadcast_is_faster_by": statistics.median(ratios),
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


def run(args: Namespace, star_model: StarModel) -> None:
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
    if args.output:
        result: dict[str, Any] = {
            "command": sys.argv,
            "machine": machine_name(),
            "torch": torch.__version__,
            "num_ranks": dist.get_world_size(),
            "num_threads": torch.get_num_threads(),
            "summary": summary,
            "rounds": rounds,
        }
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


def machine_name() -> str:
    """The GPU, or the processor as Linux names it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        parser = ArgumentParser(prog="context_encoding.py", description=__doc__.splitlines()[0])
        add_model_arguments(parser)
        add_random_model_argument(parser)
        parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
        parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
        parser.add_argument("--repeats", type=int, default=3, metavar="N")
        parser.add_argument("--output", metavar="FILE")
        args = parser.parse_args()
        cp_size = environment.world_size // args.tensor_model_parallel_size
        grid = {"tp_size": args.tensor_model_parallel_size, "cp_size": cp_size}
        timeout = args.distributed_timeout_minutes
        with process_groups(environment, **grid, timeout=timeout) as (groups, device):
            run(args, measured_model(args, groups, device))


if __name__ == "__main__":
    main()
