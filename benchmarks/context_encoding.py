"""Context encoding, side by side: exact, star with the anchor recomputed, star with the anchor broadcast.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/context_encoding.py --load .demo/megatron \\
        --num-tokens 8K --block-size 1K --repeats 3 --output result.json

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

from launch.arguments import ArgumentParser, add_model_arguments, token_count
from launch.environment import read_environment
from launch.session import exit_on_errors, process_groups
from megatron_star.config import StarConfig
from megatron_star.cost_model import choose_plan, token_costs
from megatron_star.inference.context_encoding import encode_context
from megatron_star.inference.loading import load_star_model
from megatron_star.inference.star_model import StarModel
from megatron_star.model.checkpoint import read_checkpoint_info


def variants(block_size: int) -> dict[str, StarConfig]:
    """What is compared, by name."""
    return {
        "exact": StarConfig(mode="exact"),
        "recompute": StarConfig(block_size=block_size, anchor="recompute"),
        "broadcast": StarConfig(block_size=block_size),
    }


def measure(star_model: StarModel, token_ids: list[int], config: StarConfig) -> dict[str, float]:
    """Seconds until the slowest rank has encoded the context, and bytes that all ranks sent for it."""
    exchange = star_model.exchange
    _, plan = choose_plan(len(token_ids), exchange.cp_size, config, token_costs(star_model.model.config))
    exchange.counts.clear()
    dist.barrier()
    start = perf_counter()
    encode_context(star_model, token_ids, plan)
    seconds = torch.tensor(perf_counter() - start, dtype=torch.float64)
    sent = torch.tensor(exchange.counts["broadcast_bytes"], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(sent)
    return {"seconds": seconds.item(), "bytes_sent": sent.item()}


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians by variant; `speedup` is how many times faster the broadcast is than the variant."""
    summary = {}
    for name in rounds[0]:
        ratios = [r[name]["seconds"] / r["broadcast"]["seconds"] for r in rounds]
        summary[name] = {
            "seconds": statistics.median(r[name]["seconds"] for r in rounds),
            "bytes_sent": rounds[0][name]["bytes_sent"],
            "broadcast_is_faster_by": statistics.median(ratios),
        }
    return summary


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """For people."""
    print(f"{'variant':<12} {'seconds':>9} {'MB sent':>9} {'/ broadcast':>12}")
    for name, figures in summary.items():
        sent = figures["bytes_sent"] / 1e6
        print(
            f"{name:<12} {figures['seconds']:>9.2f} {sent:>9.1f} {figures['broadcast_is_faster_by']:>12.2f}"
        )


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
            "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
            "num_ranks": dist.get_world_size(),
            "num_threads": torch.get_num_threads(),
            "summary": summary,
            "rounds": rounds,
        }
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        parser = ArgumentParser(prog="context_encoding.py", description=__doc__.splitlines()[0])
        add_model_arguments(parser)
        parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
        parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
        parser.add_argument("--repeats", type=int, default=3, metavar="N")
        parser.add_argument("--output", metavar="FILE")
        args = parser.parse_args()
        cp_size = environment.world_size // args.tensor_model_parallel_size
        grid = {"tp_size": args.tensor_model_parallel_size, "cp_size": cp_size}
        timeout = args.distributed_timeout_minutes
        with process_groups(environment, **grid, timeout=timeout) as (groups, device):
            info = read_checkpoint_info(args.load)
            dtype = args.dtype or info.dtype
            kernel = args.star_attention_kernel
            run(args, load_star_model(info, groups, device=device, dtype=dtype, kernel=kernel))


if __name__ == "__main__":
    main()
