"""Which weights a CP rank reads in token generation: decided once, when a model is loaded.

What slices save and what their collectives take is measured, on these weights and in this CP group, and
weighed by the cost model: a collective of few bytes takes 10 us on one machine and 500 us on another.
"""

import logging
from collections.abc import Callable
from itertools import batched
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_star.config import DECODE_WEIGHTS
from megatron_star.parallel.exchange import Exchange
from megatron_star.planning.cost_model import PartTimes, parts_worth_slicing
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.layout import sliceable_weights
from megatron_star.speed.sliced_linear import EXPERTS, NO_PARTS

log = logging.getLogger(__name__)

MEASURED_LAYERS = 8
REPEATS = 5


@torch.inference_mode()
def choose_sliced_parts(decode_weights: str, star_model: FastStarModel) -> frozenset[str]:
    """The parts of a loaded model to slice; the same on all ranks, which all call this.

    `sliced` takes every part that can be sliced, `auto` those where it saves time.

    Raises:
        ValueError: `decode_weights` is not one of DECODE_WEIGHTS.
    """
    check_decode_weights(decode_weights)
    weights, exchange = _weights_of_a_token(star_model), star_model.exchange
    if decode_weights == "whole" or exchange.cp_size == 1:
        return NO_PARTS
    if decode_weights == "sliced":
        return frozenset(weights)
    times = {part: _measured(part, of_part, exchange) for part, of_part in weights.items()}
    flat = torch.tensor([seconds for t in times.values() for seconds in t], dtype=torch.float64)
    slowest = exchange.slowest(flat.to(star_model.device))
    pairs = zip(slowest[::2], slowest[1::2], strict=True)
    agreed = {part: PartTimes(*pair) for part, pair in zip(times, pairs, strict=True)}
    parts = parts_worth_slicing(agreed, exchange.cp_size)
    if exchange.cp_rank == 0:
        log.info(
            "token generation reads slices of: %s; measured: %s",
            ", ".join(sorted(parts)) or "nothing",
            agreed,
        )
    return parts


def _weights_of_a_token(star_model: FastStarModel) -> dict[str, list[list[Tensor]]]:
    """What a step of one token reads of each part that can be sliced, in lists that end with an exchange."""
    num_chosen = star_model.model.config.moe_router_topk
    weights = {part: [[one] for one in of_part] for part, of_part in sliceable_weights(star_model).items()}
    if mlps := weights.get("mlp"):
        weights["mlp"] = [first + second for first, second in batched(mlps, 2)]
    if layers := star_model.slicing.experts:
        weights[EXPERTS] = [
            [
                linear.weight
                for one in experts.local_experts[:num_chosen]
                for linear in (one.linear_fc1, one.linear_fc2)
            ]
            for experts in layers
        ]
    return weights


def check_decode_weights(decode_weights: str) -> None:
    """Raises ValueError unless this is one of DECODE_WEIGHTS."""
    if decode_weights not in DECODE_WEIGHTS:
        raise ValueError(
            f"decode_weights is {decode_weights!r}: it must be one of {', '.join(DECODE_WEIGHTS)}"
        )


def _measured(part: str, weights: list[list[Tensor]], exchange: Exchange) -> PartTimes:
    """Seconds a step. Of many layers some are measured: more than a processor's cache holds, or all."""
    some = [weight for of_layer in weights[:MEASURED_LAYERS] for weight in of_layer]
    rows = [weight.new_zeros(1, weight.size(1)) for weight in some]
    read_s = _seconds(lambda: [F.linear(row, weight) for row, weight in zip(rows, some, strict=True)])
    result = some[-1].new_zeros(1, some[-1].size(0))
    if part in ("qkv", "output"):
        mine = result[:, : -(-result.size(1) // exchange.cp_size)]
        exchange_s = _seconds(lambda: exchange.gather(mine))
    else:
        exchange_s = _seconds(lambda: exchange.add_up(result))
    return PartTimes(read_s * len(weights) / len(weights[:MEASURED_LAYERS]), exchange_s * len(weights))


def _seconds(action: Callable[[], object]) -> float:
    """The median of a few runs, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        _synchronize()
        start = perf_counter()
        action()
        _synchronize()
        seconds.append(perf_counter() - start)
    return median(seconds[1:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
