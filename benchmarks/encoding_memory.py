"""Memory that encoding a context needs on a rank at most: its KV, and activations.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/encoding_memory.py --load .demo/megatron \\
        --num-tokens 16K --block-size 1K --wave-tokens 2K --output result.json

One encoding in a new process, after one of an eighth of the context that fetches libraries and the like.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.encoding_variants import BROADCAST, variant_plan
from benchmarks.measuring import over_ranks, run_on_ranks, write_result
from benchmarks.peak_memory import PeakMemory
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import token_costs


def run(args: Namespace, star_model: StarModel, _: StarGroups) -> None:
    """One encoding, and the result on rank 0."""
    cp_size, costs = star_model.exchange.cp_size, token_costs(star_model.model.config)
    token_ids = torch.arange(args.num_tokens).remainder(star_model.vocab_size).tolist()
    plans = [
        variant_plan(
            BROADCAST, count, cp_size, costs, block_size=args.block_size, wave_tokens=args.wave_tokens
        )
        for count in (min(args.block_size, args.num_tokens // 8), args.num_tokens)
    ]
    encode_context(star_model, token_ids[: plans[0].num_tokens], plans[0])
    memory = PeakMemory(star_model.device)
    context = encode_context(star_model, token_ids, plans[1])
    most = partial(over_ranks, operation=dist.ReduceOp.MAX, star_model=star_model)
    peak, kv = most(memory.num_bytes()), most(context.num_bytes)
    rows = max(
        sum(segment.num_tokens for segment in wave if segment.owner == rank)
        for wave in plans[1].waves
        for rank in range(cp_size)
    )
    if not is_driver(dist.group.WORLD):
        return
    summary = {
        "num_tokens": args.num_tokens,
        "num_ranks": cp_size,
        "most_tokens_in_a_wave": rows,
        "peak_mb": peak / 1e6,
        "kv_mb": kv / 1e6,
        "activations_mb": (peak - kv) / 1e6,
    }
    print(", ".join(f"{name} {figure:g}" for name, figure in summary.items()))
    write_result(args.output, summary, [])


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=16384, metavar="TOKENS")
    parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
    parser.add_argument("--wave-tokens", type=token_count, default=2048, metavar="TOKENS", help="of one rank")


if __name__ == "__main__":
    run_on_ranks("encoding_memory.py", __doc__.splitlines()[0], add_arguments, run)
