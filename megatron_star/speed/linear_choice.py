"""By which library a model's linear layers are fastest here."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.layout import sliceable_weights
from megatron_star.speed.linear import MANY_ROWS, Linear
from megatron_star.speed.measured import agreed, fastest, least_seconds

log = logging.getLogger(__name__)

FEW, MANY = 8, 128
"""Rows that are measured."""
MOST_PRODUCTS = 1 << 30
"""Multiplications of the many rows, of which there are then fewer."""
LIBRARIES = {"MKL": Linear(), "oneDNN": Linear(few_by_onednn=True, many_by_onednn=True)}


@torch.inference_mode()
def choose_linear(star_model: FastStarModel) -> None:
    """Let a model's linear layers use what is fastest here; called on all ranks together, which choose the
    same.
    """
    weights = [
        one
        for part, of_part in sliceable_weights(star_model).items()
        if part != "output"  # of which only the rows of few tokens are computed
        for one in {weight.shape: weight for weight in of_part}.values()
        if one.is_cpu and one.dtype == torch.float32
    ]
    if not weights:
        return
    many = max(MANY_ROWS, min(MANY, MOST_PRODUCTS // sum(weight.numel() for weight in weights)))
    seconds = {}
    for rows in (FEW, many):
        seconds |= least_seconds(
            {(rows, name): _products(linear, weights, rows) for name, linear in LIBRARIES.items()}
        )
    seconds = agreed(seconds, (star_model.exchange, star_model.tp_exchange))
    chosen = {rows: fastest({name: seconds[rows, name] for name in LIBRARIES}) for rows in (FEW, many)}
    star_model.slicing.linear = Linear(chosen[FEW] == "oneDNN", chosen[many] == "oneDNN")
    if star_model.exchange.cp_rank == star_model.tp_exchange.cp_rank == 0:
        told = (
            f"{rows} rows by {name} ("
            + ", ".join(f"{library} {1e3 * seconds[rows, library]:.2f} ms" for library in LIBRARIES)
            + ")"
            for rows, name in chosen.items()
        )
        log.info("products of a layer: %s", ", ".join(told))


def _products(linear: Linear, weights: list[Tensor], num_rows: int) -> Callable[[], object]:
    inputs = [weight.new_ones(num_rows, weight.size(1)) for weight in weights]
    return lambda: [linear(rows, weight) for rows, weight in zip(inputs, weights, strict=True)]
