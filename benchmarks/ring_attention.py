"""Exact attention alone, over the ranks: ours, and the ring of torch's own `context_parallel`.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ring_attention.py --load .demo/megatron \\
        --num-tokens 8K --repeats 3 --output result.json

One layer's attention over random query, key and value, both balanced over the ranks by giving each an early
and a late piece. torch registers its ring for CUDA's kernels only: here its loop is called with the CPU's.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

from benchmarks.encoding_variants import EXACT, variant_plan
from benchmarks.measuring import measure_rounds, median_ratio, over_ranks, run_on_ranks
from megatron_star.algorithm.context_encoding import ContextEncodingPass
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.model.attention import LayerAttention
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import token_costs

OURS, TORCH = "megatron-star", "torch context_parallel"
QueryKeyValue = tuple[Tensor, Tensor, Tensor]


def random_inputs(star_model: StarModel, num_tokens: int) -> QueryKeyValue:
    """[tokens, 1, heads, head size] of the whole context, the same on every rank."""
    config = star_model.model.config
    generator = torch.Generator().manual_seed(0)
    heads = (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
    return tuple(torch.randn(num_tokens, 1, n, config.kv_channels, generator=generator) for n in heads)


def ours(star_model: StarModel, inputs: QueryKeyValue, softmax_scale: float) -> Callable[[], Tensor]:
    """This rank's rows of the attention, [tokens, 1, heads, head size], in the order of its positions."""
    exchange, costs = star_model.exchange, token_costs(star_model.model.config)
    num_tokens = len(inputs[0])
    plan = variant_plan(EXACT, num_tokens, exchange.cp_size, costs, block_size=1, wave_tokens=num_tokens)
    context = EncodedContext(plan, exchange.cp_rank)
    step = ContextEncodingPass(star_model, plan.waves[0], context)
    local = [tensor[step.positions] for tensor in inputs]
    layer = LayerAttention(1, softmax_scale)
    return lambda: step.attend(layer, *local).out.permute(2, 0, 1, 3)


def torchs_ring(
    star_model: StarModel, inputs: QueryKeyValue, softmax_scale: float, group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """The same by torch, on the positions that its head-tail balancing gives to this rank."""
    rank, size = group.rank(), group.size()
    pieces = [tensor.chunk(2 * size) for tensor in inputs]
    local = [torch.cat((p[rank], p[2 * size - 1 - rank])).permute(1, 2, 0, 3).contiguous() for p in pieces]

    def attend() -> Tensor:
        out, _ = _templated_ring_attention(
            group,
            2,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            *local,
            is_causal=True,
            scale=softmax_scale,
        )
        return out.permute(2, 0, 1, 3)

    return attend


@torch.inference_mode()
def measure(attend: Callable[[], Tensor], star_model: StarModel) -> dict[str, float]:
    """Seconds on the slowest rank."""
    dist.barrier()
    start = perf_counter()
    attend()
    return {"seconds": over_ranks(perf_counter() - start, dist.ReduceOp.MAX, star_model)}


@torch.inference_mode()
def run(args: Namespace, star_model: StarModel, groups: StarGroups) -> None:
    """All rounds, and the result on rank 0."""
    inputs = random_inputs(star_model, args.num_tokens)
    scale = star_model.model.config.kv_channels**-0.5
    variants = {
        OURS: ours(star_model, inputs, scale),
        TORCH: torchs_ring(star_model, inputs, scale, groups.cp),
    }
    torch.testing.assert_close(*(attend() for attend in variants.values()), rtol=1e-4, atol=1e-4)
    summary = measure_rounds(
        args,
        lambda: {name: measure(attend, star_model) for name, attend in variants.items()},
        summarise,
    )
    if not is_driver(dist.group.WORLD):
        return
    for name, figures in summary.items():
        print(f"{name:<24}{figures['seconds']:>10.2f} s{figures['to_ours']:>10.2f} times ours")


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each variant: the median, and its ratio to ours."""
    return {
        name: {
            "seconds": statistics.median(r[name]["seconds"] for r in rounds),
            "to_ours": median_ratio(rounds, name, OURS, "seconds"),
        }
        for name in rounds[0]
    }


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")


if __name__ == "__main__":
    run_on_ranks("ring_attention.py", __doc__.splitlines()[0], add_arguments, run)
