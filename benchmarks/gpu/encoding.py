"""The stages about context encoding: one rank alone, and the work of one rank of many."""

from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from benchmarks.counted_work import encoding_bytes_of
from benchmarks.gpu.bench import Bench, plan_of, written
from benchmarks.gpu.one_of_many import OneOfMany
from benchmarks.models import SHAPES, Shape, share_of_a_tp_rank
from benchmarks.peak_memory import PeakMemory
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kernels import select_kernel
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.sizes import ANCHOR_SIZE, recommended_passed_keys

TP_SHARES = {"llama-3.1-8b": ("llama-3.1-70b", 8, 20), "tiny": ("tiny", 2, 2)}
"""Beside a model, what ranks of a larger one would do: its name, TP ranks, and so many of its layers."""

LARGEST_BLOCK_UNITS = 4
RANKS = (8, 32)


def load(bench: Bench) -> None:
    """The model with random weights."""
    start = perf_counter()
    star_model = bench.star_model
    bench.synchronize()
    found = {
        "s": perf_counter() - start,
        "kernel": star_model.kernel.name,
        "params": num_parameters(star_model),
    }
    bench.figures.write("load", bench.model_name, **found)


def num_parameters(star_model: StarModel) -> int:
    """Of the model."""
    return sum(parameter.numel() for parameter in star_model.model.parameters())


def encode(bench: Bench) -> None:
    """32K tokens with every kernel; then 32K and 128K exact, and by star in each way."""
    star_model, unit = bench.star_model, bench.unit
    exact, costs = plan_of(star_model, 4 * unit, mode="exact")
    timed_encoding(bench, star_model, plan_of(star_model, unit, mode="exact")[0])  # libraries begin
    for name in bench.kernels(bench.shape["kv_channels"]):
        if name != "torch-efficient" and bench.has_time_for(exact.cost(costs), repeats=2):
            with bench.figure("encode", f"{written(4 * unit)} exact, {name}") as found:
                model = replace(star_model, kernel=_kernel(bench, name))
                timed_encoding(bench, model, exact)
                found |= encoding_figures(bench, model, exact, costs)[0]
    for num_tokens in (4 * unit, 16 * unit):
        for label, options in _variants(unit):
            plan, _ = plan_of(star_model, num_tokens, **options)
            if bench.has_time_for(plan.cost(costs)):
                with bench.figure("encode", f"{written(num_tokens)} {label}") as found:
                    if bench.has_time_for(plan.cost(costs), repeats=20):
                        timed_encoding(bench, star_model, plan)  # kernels of new shapes are chosen
                    found |= encoding_figures(bench, star_model, plan, costs)[0]


def ranks(bench: Bench) -> None:
    """Rank r of H alone: of this model, and of a larger one's layers as a TP rank has them."""
    whole, tp_size, num_layers = TP_SHARES[bench.model_name]
    share = share_of_a_tp_rank(SHAPES[whole], tp_size, num_layers)
    _ranks_of(bench, bench.star_model, bench.model_name, all_reduced=0)
    bench.forget_models()
    name = f"{whole}, TP {tp_size}, {num_layers} layers"
    _ranks_of(bench, bench.random_model(share), name, all_reduced=_all_reduced_bytes(share))


def _ranks_of(bench: Bench, star_model: StarModel, name: str, *, all_reduced: int) -> None:
    """128K before 1M, star before exact, which may take minutes."""
    for units, cp_size, mode in _rank_cases():
        num_tokens = units * bench.unit
        block_size = min(LARGEST_BLOCK_UNITS * bench.unit, num_tokens // cp_size)
        options = encoding_options(mode, block_size)
        plan, costs = plan_of(star_model, num_tokens, cp_size, **options)
        for rank in slowest_ranks(plan, costs):
            if not bench.has_time_for(_cost_of(plan, rank, costs)):
                continue
            label = f"{name}: {written(num_tokens)} {mode}, rank {rank} of {cp_size}"
            with bench.figure("ranks", label) as found:
                exchange = OneOfMany(rank, cp_size)
                model = replace(star_model, exchange=exchange)
                if bench.has_time_for(_cost_of(plan, rank, costs), repeats=20):
                    timed_encoding(bench, model, plan)
                    exchange.counts.clear()
                    exchange.received_bytes = 0
                figures, context = encoding_figures(bench, model, plan, costs)
                found |= figures | {
                    "block": block_size if mode != "exact" else None,
                    "sent_mb": encoding_bytes_of(exchange) / 1e6,
                    "received_mb": exchange.received_bytes / 1e6,
                    "all_reduced_mb": all_reduced * plan.num_owned_tokens(rank) / 1e6,
                }
                del context


def _rank_cases() -> Iterator[tuple[int, int, str]]:
    star = ("passed", "broadcast", "recompute")
    for units, modes in ((16, (*star, "exact")), (128, star)):
        for mode in modes:
            yield from ((units, cp_size, mode) for cp_size in RANKS)
    yield from ((128, cp_size, "exact") for cp_size in reversed(RANKS))


def slowest_ranks(plan: ContextPlan, costs: TokenCosts) -> list[int]:
    """The first rank, and the one with most work, if that is another."""
    most = max(range(plan.cp_size), key=lambda rank: _cost_of(plan, rank, costs))
    return list(dict.fromkeys((most, 0)))


def _cost_of(plan: ContextPlan, rank: int, costs: TokenCosts) -> float:
    return sum(segment.cost(plan.mask, costs) for segment in plan.owned(rank))


def _all_reduced_bytes(shape: Shape) -> int:
    """Of a token on a TP rank: two sums of the hidden state a layer, in 16 bits."""
    return 2 * 2 * shape["hidden_size"] * shape["num_layers"]


def _variants(unit: int) -> list[tuple[str, dict[str, Any]]]:
    """Exact, ours, the published one, which runs a forward pass for each block, and the recommended one."""
    return [
        ("exact", encoding_options("exact", unit)),
        ("star, broadcast", encoding_options("broadcast", unit)),
        ("star, recompute", encoding_options("recompute", unit) | {"wave_tokens": unit}),
        ("star, passed", encoding_options("passed", unit)),
    ]


def encoding_options(way: str, block_size: int) -> dict[str, Any]:
    """Of `StarConfig`."""
    if way == "exact":
        return {"mode": "exact"}
    if way == "passed":
        passed_keys = recommended_passed_keys(block_size)
        return {"block_size": block_size, "anchor_size": ANCHOR_SIZE, "passed_keys": passed_keys}
    return {"block_size": block_size, "anchor": way}


def encoding_figures(
    bench: Bench, star_model: StarModel, plan: ContextPlan, costs: TokenCosts
) -> tuple[dict[str, Any], EncodedContext]:
    """Seconds, operations and memory of this rank's share of a plan, and what it encoded."""
    memory = PeakMemory(bench.device)
    seconds, waves, context = timed_encoding(bench, star_model, plan)
    flops = _cost_of(plan, star_model.exchange.cp_rank, costs)
    found = {"s": seconds, "tokens_per_s": plan.num_tokens / seconds} | bench.reached(flops, seconds)
    found |= {"peak_gb": memory.num_bytes() / 1e9, "kv_gb": context.num_bytes / 1e9}
    return found | {"waves": len(waves), "slowest_wave_s": max(waves)}, context


def timed_encoding(
    bench: Bench, star_model: StarModel, plan: ContextPlan
) -> tuple[float, list[float], EncodedContext]:
    """Seconds in all and of each wave, and the context."""
    token_ids = torch.arange(plan.num_tokens).remainder(star_model.vocab_size).tolist()
    times = [perf_counter()]

    def on_wave(_: int) -> None:
        bench.synchronize()
        times.append(perf_counter())

    bench.synchronize()
    times[0] = perf_counter()
    context = encode_context(star_model, token_ids, plan, on_wave)
    waves = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return times[-1] - times[0], waves, context


def _kernel(bench: Bench, name: str) -> Any:
    head_size = bench.shape["kv_channels"]
    return select_kernel(name, device=bench.device, dtype=bench.dtype, head_size=head_size)
