"""Experts over ranks, beside all experts on every rank: token generation and context encoding.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --load - --fp32 \\
        --random-model qwen3-moe-1b --expert-model-parallel-size 2 --compile --output result.json

Both models run in one process group with the same weights, one after the other, `--repeats` times; ratios are
medians within a round. Whatever else a step reads is the same on both sides: of attention and of the output
layer whole weights, or slices. With slices of experts every rank reads its part of each chosen expert. Then
no rank has more to read than another, but each has all experts in its memory.

Of the experts that tokens chose, the rank with most of them has the share *busiest*, which is counted. So
reading experts is at most 1 / busiest times as fast.
"""

import re
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401, I001  first, since it silences what Megatron-Core says at import
import torch
import torch.distributed as dist

from benchmarks.decode import filled_context, measure
from benchmarks.encoding_variants import EXACT, engine_wave_tokens, variant_plan
from benchmarks.measuring import machine_name, measure_rounds, median_ratio, over_ranks, run_on_ranks
from benchmarks.models import SHAPES, random_star_model
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.model.expert_layer import moe_layers
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import token_costs
from megatron_star.speed.attach import with_compiled_layers
from megatron_star.speed.decode_weights import choose_sliced_parts
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.layout import lay_out_for_reading
from megatron_star.speed.sliced_linear import EXPERTS, NO_PARTS

Round = dict[str, dict[str, float]]
Step = Callable[[], object]
WHOLE, SPREAD = "EP 1", "EP"
SLICED, EXPERTS_SLICED, COMPILED = ", sliced", ", experts sliced", ", compiled"
ENCODING = "encoding, "


class Variant(NamedTuple):
    """What generates tokens.

    Attributes:
        parts: those of the model of which a rank reads its slice.
        base: the variant that it is compared with.
    """

    star_model: FastStarModel
    parts: frozenset[str]
    base: str


def with_all_experts(groups: StarGroups) -> StarGroups:
    """The same ranks where the ranks of each TP group have all experts."""
    model = copy(groups.model)
    model.ep, model.expt_tp, model.tp_ep = model.cp, model.tp, model.tp
    return replace(groups, model=model)


@torch.no_grad()
def copy_weights(whole: FastStarModel, spread: FastStarModel) -> None:
    """Give the model whose experts are spread the weights of the one that has all of them."""
    weights = dict(whole.model.named_parameters())
    first = moe_layers(spread.model)[0].local_expert_indices[0]
    for name, weight in spread.model.named_parameters():
        same = re.sub(r"(?<=local_experts\.)\d+", lambda number: str(first + int(number[0])), name)
        weight.copy_(weights[same])


def make_variants(args: Namespace, whole: FastStarModel, spread: FastStarModel) -> dict[str, Variant]:
    """All of them, by name."""
    all_parts = choose_sliced_parts("sliced", whole)
    beside_experts = all_parts - {EXPERTS}
    variants = {}
    for name, star_model, parts, base in (
        (WHOLE, whole, NO_PARTS, WHOLE),
        (SPREAD, spread, NO_PARTS, WHOLE),
        (WHOLE + SLICED, whole, beside_experts, WHOLE + SLICED),
        (SPREAD + SLICED, spread, beside_experts, WHOLE + SLICED),
        (WHOLE + EXPERTS_SLICED, whole, all_parts, WHOLE + SLICED),
    ):
        for suffix, rows in (("", ()), (COMPILED, (args.sequences,)))[: 1 + args.compile]:
            model = with_compiled_layers(replace(star_model, sliced_parts=parts), rows)
            variants[name + suffix] = Variant(model, parts, base + suffix)
    return variants


def token_step(
    star_model: FastStarModel, context: EncodedContext, num_sequences: int, seed: int
) -> Callable[[], torch.Tensor]:
    """Generates a token for each sequence after random ones, so that each token has experts of its own."""
    generator = torch.Generator().manual_seed(seed)
    cp_size, size = star_model.exchange.cp_size, (num_sequences, 1)
    sequences = [Sequence(context, tail_rank=i % cp_size) for i in range(num_sequences)]

    def step() -> torch.Tensor:
        tokens = torch.randint(star_model.vocab_size, size, generator=generator).tolist()
        return generate_step(star_model, list(zip(sequences, tokens, strict=True)))

    return step


def busiest_share(star_model: FastStarModel, step: Step, num_steps: int) -> float:
    """The part of the experts chosen in a layer that the rank with most of them has: its mean over steps.

    An expert counts once a step, since its weights are read once for all sequences.
    """
    layers, shares = moe_layers(star_model.model), []
    num_ranks = layers[0].ep_group.size()
    for _ in range(num_steps):
        before = [layer.load.clone() for layer in layers]
        step()
        for layer, load in zip(layers, before, strict=True):
            chosen = of_all_ranks(layer.load - load).view(num_ranks, -1).count_nonzero(1)
            shares.append(float(chosen.max() / chosen.sum()))
    return statistics.mean(shares)


def of_all_ranks(load: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, one of which counts what they all have."""
    dist.all_reduce(load)
    return load


def largest_difference(variants: dict[str, Variant], context: EncodedContext, num_sequences: int) -> float:
    """Of the logits of all variants after the same tokens: whether they compute the same model."""
    logits = [token_step(one.star_model, context, num_sequences, seed=0)() for one in variants.values()]
    return max(float((one - logits[0]).abs().max()) for one in logits)


def encoding_seconds(star_model: FastStarModel, token_ids: list[int]) -> float:
    """Of the slowest rank; exact attention, balanced."""
    costs, wave_tokens = token_costs(star_model.model.config), engine_wave_tokens(star_model.device)
    sizes = {"block_size": len(token_ids), "wave_tokens": wave_tokens}
    plan = variant_plan(EXACT, len(token_ids), star_model.exchange.cp_size, costs, **sizes)
    dist.barrier()
    start = perf_counter()
    encode_context(star_model, token_ids, plan)
    star_model.synchronize()
    return over_ranks(perf_counter() - start, dist.ReduceOp.MAX, star_model)


def run(args: Namespace, spread: FastStarModel, groups: StarGroups) -> None:
    """All rounds, and a table on rank 0. `spread` is the model of `--expert-model-parallel-size`."""
    whole = random_star_model(
        SHAPES[args.random_model],
        with_all_experts(groups),
        device=spread.device,
        dtype=spread.model.config.params_dtype,
        kernel=args.star_attention_kernel,
        decode_weights="whole",
    )
    copy_weights(whole, spread)
    variants, models = make_variants(args, whole, spread), {WHOLE: whole, SPREAD: spread}
    context = filled_context(spread, args.num_tokens)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(spread.vocab_size, (args.encoded_tokens,), generator=generator).tolist()
    busiest = busiest_share(spread, token_step(spread, context, args.sequences, seed=0), args.num_steps)
    seeds = count(1)

    def measure_all() -> Round:
        figures, seed = {}, next(seeds)
        for name, (star_model, parts, _) in variants.items():
            lay_out_for_reading(star_model, parts)
            step = token_step(star_model, context, args.sequences, seed)
            figures[name] = measure(step, args.num_steps, star_model)
        for name, star_model in models.items():
            figures[ENCODING + name] = {"seconds": encoding_seconds(star_model, token_ids)}
        return figures

    facts = {
        "busiest": {"share": busiest},
        "same logits": {"difference": largest_difference(variants, context, args.sequences)},
    }
    summary = measure_rounds(args, measure_all, lambda rounds: summarise(rounds, variants) | facts)
    if is_driver(dist.group.WORLD):
        print_summary(summary)


def summarise(rounds: list[Round], variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Medians by variant, and ratios to its base."""
    tokens = {
        name: {
            "tpot_ms": 1e3 * statistics.median(r[name]["tpot_s"] for r in rounds),
            "fastest_ms": 1e3 * min(r[name]["fastest_s"] for r in rounds),
            "processor_ms": 1e3 * statistics.median(r[name]["processor_s"] for r in rounds),
            "faster": median_ratio(rounds, variant.base, name, "tpot_s"),
        }
        for name, variant in variants.items()
    }
    encodings = {
        ENCODING + name: {
            "seconds": statistics.median(r[ENCODING + name]["seconds"] for r in rounds),
            "faster": median_ratio(rounds, ENCODING + WHOLE, ENCODING + name, "seconds"),
        }
        for name in (WHOLE, SPREAD)
    }
    return tokens | encodings


def print_summary(summary: dict[str, dict[str, float]]) -> None:
    """For people."""
    print(f"on {machine_name()}, {dist.get_world_size()} ranks")
    print(f"{'variant':<34}{'TPOT ms':>10}{'fastest':>10}{'processor':>10}{'faster':>10}")
    for name, figures in summary.items():
        if "tpot_ms" in figures:
            cells = "".join(f"{figure:>10.2f}" for figure in figures.values())
            print(f"{name:<34}{cells}")
    print(f"logits differ by at most {summary['same logits']['difference']:.1g}")
    print(f"the busiest rank has {summary['busiest']['share']:.3f} of the experts that a step chooses")
    for name in (ENCODING + WHOLE, ENCODING + SPREAD):
        print(f"{name:<34}{summary[name]['seconds']:>10.2f} s{summary[name]['faster']:>28.2f}")


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--num-tokens", type=token_count, default=2048, metavar="TOKENS", help="of the context of a new token"
    )
    parser.add_argument("--encoded-tokens", type=token_count, default=2048, metavar="TOKENS")
    parser.add_argument("--sequences", type=int, default=1, metavar="N", help="that get a token in a step")
    parser.add_argument("--num-steps", type=int, default=16, metavar="N", help="tokens in a round")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too")


if __name__ == "__main__":
    run_on_ranks("expert_parallel.py", __doc__.splitlines()[0], add_arguments, run)
