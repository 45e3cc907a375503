"""Context encoding, side by side: exact, star with the anchor recomputed or broadcast, star with passed keys.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/context_encoding.py --load .demo/megatron \\
        --num-tokens 8K --block-size 1K --repeats 3 --output result.json

On GPUs, without a checkpoint: `--load - --random-model llama-3.1-8b --bf16 --num-tokens 128K`.

All variants run in one process group, one after the other, `--repeats` times; figures are medians, and ratios
are medians of the ratios within a round, so that a machine that becomes slower in between does not bend them.
Beside each variant stands its floor (encoding_floor.py), measured in the same round. TFLOP/s are of the
slowest CP rank, by the cost model.
"""

import statistics
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.counted_work import count_work, encoding_bytes_of
from benchmarks.encoding_floor import floor_of
from benchmarks.encoding_variants import (
    BROADCAST,
    CONTIGUOUS,
    EXACT,
    PASSED,
    RECOMPUTE,
    engine_wave_tokens,
    variant_plan,
)
from benchmarks.measuring import measure_rounds, median_ratio, over_ranks, run_on_ranks
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import encoding_bytes, encoding_operations, kv_layers, token_costs
from megatron_star.planning.plan import ContextPlan, TokenCosts

VARIANTS = (EXACT, CONTIGUOUS, RECOMPUTE, BROADCAST, PASSED)
Figures = dict[str, float]


def measure(star_model: StarModel, token_ids: list[int], plan: ContextPlan) -> Figures:
    """One encoding and its floor; of the slowest rank, or the one that needs most."""
    exchange, most = (
        star_model.exchange,
        partial(over_ranks, operation=dist.ReduceOp.MAX, star_model=star_model),
    )
    floor = floor_of(star_model, plan)
    exchange.counts.clear()
    dist.barrier()
    start = perf_counter()
    encode_context(star_model, token_ids, plan)
    star_model.synchronize()
    seconds = most(perf_counter() - start)
    return {
        "seconds": seconds,
        "tflops_per_s": plan.cost(token_costs(star_model.model.config)) / seconds / 1e12,
        "floor_s": most(floor.linear_s + floor.attention_s),
        "linear_floor_s": most(floor.linear_s),
        "attention_floor_s": most(floor.attention_s),
        "bytes_sent": over_ranks(encoding_bytes_of(exchange), dist.ReduceOp.SUM, star_model),
    }


def check_cost_model(star_model: StarModel, token_ids: list[int], plan: ContextPlan) -> Figures:
    """Operations and bytes of all ranks, counted while a context is encoded, in units of the cost model's."""
    config, total = (
        star_model.model.config,
        partial(over_ranks, operation=dist.ReduceOp.SUM, star_model=star_model),
    )
    work = count_work(star_model, token_ids, plan)
    linear, attention = encoding_operations(plan, config)
    kv = kv_layers(config, tp_size=1, bytes_per_value=config.params_dtype.itemsize)
    return {
        "linear_operations": total(work.linear) / linear,
        "attention_operations": total(work.attention) / attention,
        "bytes_counted": total(work.bytes_sent),
        "bytes_predicted": encoding_bytes(plan, kv),
    }


def predicted_ratio(
    plans: dict[str, ContextPlan], costs: TokenCosts, rounds: list[dict[str, Figures]], name: str
):
    """What the cost model expects of a variant's time in units of the broadcast's.

    Its operations, at the rates of matrix products and of attention that the broadcast's floor had.
    """
    linear_s, attention_s = (
        statistics.median(r[BROADCAST][part] for r in rounds)
        for part in ("linear_floor_s", "attention_floor_s")
    )
    linear = plans[BROADCAST].cost(TokenCosts(costs.linear_per_token))
    attention = plans[BROADCAST].cost(costs._replace(linear_per_token=0.0))
    in_seconds = costs.scaled(linear_s / linear, attention_s / attention)
    return plans[name].cost(in_seconds) / plans[BROADCAST].cost(in_seconds)


def summarise(
    rounds: list[dict[str, Figures]], plans: dict[str, ContextPlan], costs: TokenCosts
) -> dict[str, Figures]:
    """Medians by variant, and ratios to the broadcast."""
    return {
        name: {figure: statistics.median(r[name][figure] for r in rounds) for figure in rounds[0][name]}
        | {
            "to_broadcast": median_ratio(rounds, name, BROADCAST, "seconds"),
            "predicted_to_broadcast": predicted_ratio(plans, costs, rounds, name),
            "of_floor": statistics.median(r[name]["floor_s"] / r[name]["seconds"] for r in rounds),
        }
        for name in rounds[0]
    }


def print_table(summary: dict[str, Figures]) -> None:
    """For people."""
    titles = ("seconds", "/ broadcast", "predicted", "% of floor", "TFLOP/s", "MB sent")
    print(f"{'variant':<18}" + "".join(f"{title:>13}" for title in titles))
    for name, figures in summary.items():
        cells = (
            figures["seconds"],
            figures["to_broadcast"],
            figures["predicted_to_broadcast"],
            figures["of_floor"] * 100,
            figures["tflops_per_s"],
            figures["bytes_sent"] / 1e6,
        )
        print(f"{name:<18}" + "".join(f"{cell:>13.2f}" for cell in cells), flush=True)


def print_checks(checks: dict[str, Figures]) -> None:
    """How well the cost model knows what is done."""
    print("counted / predicted, at a quarter of the tokens:")
    for name, check in checks.items():
        bytes_agree = "equal" if check["bytes_counted"] == check["bytes_predicted"] else "DIFFERENT"
        print(
            f"{name:<18}   matrix products {check['linear_operations']:.3f}, "
            f"attention {check['attention_operations']:.3f}, bytes {bytes_agree}",
            flush=True,
        )


def run(args: Namespace, star_model: StarModel, _: StarGroups) -> None:
    """All rounds, and the result on rank 0."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(star_model.vocab_size, (args.num_tokens,), generator=generator).tolist()
    cp_size, costs = star_model.exchange.cp_size, token_costs(star_model.model.config)
    wave_tokens = args.wave_tokens or engine_wave_tokens(star_model.device)
    sizes = {name: getattr(args, name) for name in ("block_size", "anchor_size", "passed_keys")}
    sizes["wave_tokens"] = wave_tokens
    plans = {name: variant_plan(name, args.num_tokens, cp_size, costs, **sizes) for name in args.variants}
    beginning = token_ids[: args.num_tokens // 4]
    checks = {
        name: check_cost_model(
            star_model, beginning, variant_plan(name, len(beginning), cp_size, costs, **sizes)
        )
        for name in plans
    }
    summary = measure_rounds(
        args,
        lambda: {name: measure(star_model, token_ids, plan) for name, plan in plans.items()},
        lambda rounds: summarise(rounds, plans, costs) | {"cost model": checks},
    )
    if is_driver(dist.group.WORLD):
        print_table({name: summary[name] for name in plans})
        print_checks(checks)


def _variants(text: str) -> list[str]:
    names = [
        name.strip().replace(",", ", ") if ", " not in name else name.strip() for name in text.split(";")
    ]
    if unknown := set(names) - set(VARIANTS):
        raise ValueError(f"unknown variant {unknown.pop()!r}: there are {'; '.join(VARIANTS)}")
    return list(dict.fromkeys([*names, BROADCAST]))


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
    parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
    for flag, metavar in (("--anchor-size", "TOKENS"), ("--passed-keys", "KEYS")):
        parser.add_argument(
            flag, type=token_count, metavar=metavar, help=f"of {PASSED!r}; default: as recommended for blocks"
        )
    parser.add_argument(
        "--wave-tokens", type=token_count, metavar="TOKENS", help="of one rank; default: as the engine's"
    )
    parser.add_argument("--variants", type=_variants, default=list(VARIANTS), help="separated by semicolons")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")


if __name__ == "__main__":
    run_on_ranks("context_encoding.py", __doc__.splitlines()[0], add_arguments, run)
