"""Token generation, side by side: whole weights, slices of them, one rank alone, and Hugging Face.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/decode.py --load .demo/megatron --hf .demo/hf \\
        --num-tokens 8K --repeats 5 --output result.json

All variants run in one process group, one after the other, `--repeats` times, with the weights laid out as
they are for the variant when a model is loaded; with `--compile` also with compiled layers, which are
compared with those of one rank. Ratios are medians within a round. The fastest token of all rounds is what a
busy machine disturbed least. The context is not encoded: its KV is filled with random numbers, on which the
speed does not depend. While one rank works alone, the others wait in a collective, which takes no processor
time over gloo.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measuring import measure_rounds, median_ratio, over_ranks, run_on_ranks
from benchmarks.models import hugging_face_model
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import token_costs
from megatron_star.planning.model_shape import latent_attention
from megatron_star.planning.plan import ContextPlan
from megatron_star.speed.attach import with_compiled_layers
from megatron_star.speed.decode_weights import choose_sliced_parts
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.layout import lay_out_for_reading
from megatron_star.speed.sliced_linear import NO_PARTS
from megatron_star.speed.step_graph import NUM_PLAIN

Step = Callable[[], object]
Round = dict[str, dict[str, float]]
ONE_RANK = "one rank"
COMPILED = ", compiled"


def filled_context(star_model: StarModel, num_tokens: int) -> EncodedContext:
    """A context of exact attention, spread over the CP ranks, with random keys and values."""
    config, exchange = star_model.model.config, star_model.exchange
    plan = ContextPlan.build(num_tokens, exchange.cp_size, StarConfig(mode="exact"), token_costs(config))
    context = EncodedContext(plan, exchange.cp_rank, kv_format=star_model.kv_format)
    groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
    sizes = [(groups, config.kv_channels)] * 2
    if latent := latent_attention(config):
        sizes = [(1, latent.stored_values), (1, 0)]
    for layer_number in range(1, config.num_layers + 1):
        for segment in plan.owned(exchange.cp_rank):
            shapes = [(segment.num_tokens, 1, *size) for size in sizes]
            like = {"dtype": config.params_dtype, "device": star_model.device}
            context.store(layer_number, segment.start, *(torch.randn(shape, **like) for shape in shapes))
    return context


def star_step(star_model: StarModel, context: EncodedContext) -> Step:
    """Generates one more token after this context; the tail is on the last rank."""
    sequence = Sequence(context, star_model.exchange.cp_size - 1)
    return lambda: generate_step(star_model, [(sequence, [1])])


@torch.inference_mode()
def hugging_face_step(model: PreTrainedModel, num_tokens: int) -> Step:
    """The same with transformers' SDPA and its default cache."""
    config = model.config
    shape = (1, config.num_key_value_heads, num_tokens, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, dtype=model.dtype, device=model.device), layer)
    token = torch.tensor([[1]], device=model.device)

    @torch.inference_mode()
    def step() -> object:
        return model(token, **{cache_argument(model): cache}, use_cache=True).logits

    return step


def cache_argument(model: PreTrainedModel) -> str:
    """What `forward` calls its cache: transformers 5 has renamed it on the way."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class Variant(NamedTuple):
    """What is compared.

    Attributes:
        begin: gives what generates one token, and does nothing on a rank that takes no part.
        layout: the parts of which slices are read, for which the weights are laid out.
        base: the variant of one rank that it is compared with.
    """

    begin: Callable[[], Step]
    layout: frozenset[str]
    base: str


def make_variants(args: Namespace, star_model: FastStarModel, groups: StarGroups) -> dict[str, Variant]:
    """All of them, by name."""
    sliced = choose_sliced_parts("sliced", star_model)
    auto = choose_sliced_parts("auto", star_model)
    if is_driver(dist.group.WORLD):
        print(f"auto: slices of {', '.join(sorted(auto)) or 'nothing'}")
    works = star_model.exchange.cp_rank == 0
    alone = replace(star_model, exchange=Exchange(groups.model.cp))
    variants, contexts = {}, {}  # a context of 128K tokens of an 8B model takes 17 GB: one for all variants
    for name, of_ranks, parts in (
        ("whole", star_model, NO_PARTS),
        ("sliced", star_model, sliced),
        ("auto", star_model, auto),
        (ONE_RANK, alone, NO_PARTS),
    ):
        if star_model.exchange.cp_size == 1 and name != ONE_RANK:
            continue  # all the same on one rank
        model = replace(of_ranks, sliced_parts=parts)
        takes_part = works or of_ranks is star_model
        lay_out_for_reading(model, parts)
        if takes_part and id(of_ranks) not in contexts:
            contexts[id(of_ranks)] = filled_context(of_ranks, args.num_tokens)
        for suffix, rows in (("", ()), (COMPILED, (1,)))[: 1 + args.compile]:
            # The layers of a model keep all programs that were compiled; the step decides which one runs.
            # The context's spare capacity belongs to one sequence: each measurement begins a new one.
            compiled = with_compiled_layers(model, rows) if takes_part else None
            begin = partial(star_step, compiled, contexts[id(of_ranks)]) if takes_part else _nothing
            variants[name + suffix] = Variant(begin, parts, ONE_RANK + suffix)
    if args.hf:
        model = hugging_face_model(args, star_model.device) if works else None
        begin = partial(hugging_face_step, model, args.num_tokens) if works else _nothing
        variants["hugging face"] = Variant(begin, NO_PARTS, ONE_RANK)
    return variants


def _nothing() -> Step:
    """What a rank that takes no part begins."""
    return lambda: None


def measure(step: Step, num_steps: int, star_model: StarModel) -> dict[str, float]:
    """Seconds of a token: the mean, the shortest, and the processor's alone, on the rank with most.

    Tokens before are not counted: one, or on a GPU those until a step is replayed. The processor's seconds
    leave out waiting: for other ranks, and for other programs on the machine.
    """
    dist.barrier()
    for _ in range(1 if star_model.device.type == "cpu" else NUM_PLAIN + 3):
        step()
    seconds, processor_s = [], process_time()
    for _ in range(num_steps):
        star_model.synchronize()
        start = perf_counter()
        step()
        star_model.synchronize()
        seconds.append(perf_counter() - start)
    figures = {
        "tpot_s": statistics.mean(seconds),
        "fastest_s": min(seconds),
        "processor_s": (process_time() - processor_s) / num_steps,
    }
    return {name: over_ranks(value, dist.ReduceOp.MAX, star_model) for name, value in figures.items()}


def run(args: Namespace, star_model: FastStarModel, groups: StarGroups) -> None:
    """All rounds, and a table on rank 0."""
    variants = make_variants(args, star_model, groups)

    def measure_all() -> Round:
        figures = {}
        for name, variant in variants.items():
            lay_out_for_reading(star_model, variant.layout)
            figures[name] = measure(variant.begin(), args.num_steps, star_model)
        return figures

    summary = measure_rounds(args, measure_all, lambda rounds: summarise(rounds, variants))
    if is_driver(dist.group.WORLD):
        print(f"{'variant':<20}" + "".join(f"{title:>22}" for title in next(iter(summary.values()))))
        for name, figures in summary.items():
            print(f"{name:<20}" + "".join(f"{figure:>22.2f}" for figure in figures.values()))


def summarise(rounds: list[Round], variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Medians and the fastest by variant, and ratios to its base on one rank."""
    return {
        name: {
            "tpot_ms": 1e3 * statistics.median(r[name]["tpot_s"] for r in rounds),
            "fastest_ms": 1e3 * min(r[name]["fastest_s"] for r in rounds),
            "processor_ms": 1e3 * statistics.median(r[name]["processor_s"] for r in rounds),
            "faster_than_one_rank": median_ratio(rounds, variant.base, name, "tpot_s"),
            "processor_ratio": median_ratio(rounds, variant.base, name, "processor_s"),
        }
        for name, variant in variants.items()
    }


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
    parser.add_argument("--num-steps", type=int, default=8, metavar="N", help="tokens in a round")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too")
    parser.add_argument(
        "--hf",
        metavar="DIR",
        help="the same model for transformers, to measure beside; random: of the shape of --random-model",
    )


if __name__ == "__main__":
    run_on_ranks("decode.py", __doc__.splitlines()[0], add_arguments, run)
