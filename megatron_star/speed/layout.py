"""How weights lie in memory: as token generation reads them fastest here, which is measured.

By columns, a row's values for all columns are neighbors, and one token's product is a sum of scaled vectors;
by rows, a column's values for all rows are, and it is many dot products. Many tokens' products take as long
either way. A slice lies in one piece one way, and with gaps the other way.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_star.model.grouped_experts import StackedExperts
from megatron_star.speed.fast_model import FastStarModel, WeightUse
from megatron_star.speed.measured import agreed, fastest, least_seconds
from megatron_star.speed.sliced_linear import EXPERTS, NO_PARTS, SummedLinear, even_range

log = logging.getLogger(__name__)

MEASURED_BYTES = 1 << 25
"""Weights of so many bytes are read in turn, since a token finds none in a cache."""
MOST_COPIES = 32


def sliceable_weights(star_model: FastStarModel) -> dict[str, list[torch.nn.Parameter]]:
    """By part, the weights that can be sliced, but those of experts: all but TransformerEngine's layers'."""
    model = star_model.model
    weights = {part: [layer.weight for layer in layers] for part, layers in star_model.slicing.layers.items()}
    output = model.output_layer.weight
    tied = output is None
    return weights | {"output": [model.shared_embedding_or_output_weight() if tied else output]}


def lay_out_for_reading(star_model: FastStarModel, sliced_parts: frozenset[str] = NO_PARTS) -> None:
    """Lay weights out as `FastStarModel.by_columns` has it, where that matters: float32 on a CPU.

    What was not measured lies by columns if it has as many columns as rows, and slices in one piece.
    """
    for module in star_model.model.modules():
        if isinstance(module, StackedExperts):
            _lay_out_experts(module, star_model, is_sliced=EXPERTS in sliced_parts)
    for part, weight, divides_rows in _matrices(star_model):
        is_sliced = part in sliced_parts
        use = WeightUse(*weight.shape, is_sliced, is_sliced and divides_rows)
        lay_out(weight, by_columns=star_model.by_columns.get(use, _by_columns_unmeasured(use)))


def lay_out(weight: torch.nn.Parameter, *, by_columns: bool) -> None:
    """Lay a weight [columns, rows] out in memory; its shape and values stay."""
    weight.data = _laid_out(weight.data, by_columns=by_columns)


@torch.inference_mode()
def choose_layouts(star_model: FastStarModel) -> FastStarModel:
    """The model with the layouts that are read fastest here; called on all ranks together, which choose the
    same. It changes no weight.
    """
    seconds = {}
    for use in _uses(star_model):
        preferred = _by_columns_unmeasured(use)
        actions = {
            (use, by_columns): _reading(use, by_columns, star_model)
            for by_columns in (preferred, not preferred)
        }
        seconds |= least_seconds(actions)
    if not seconds:
        return star_model
    seconds = agreed(seconds, (star_model.exchange, star_model.tp_exchange))
    chosen = {}
    for use in dict.fromkeys(use for use, _ in seconds):
        preferred = _by_columns_unmeasured(use)
        chosen[use] = fastest(
            {by_columns: seconds[use, by_columns] for by_columns in (preferred, not preferred)}
        )
    if star_model.exchange.cp_rank == star_model.tp_exchange.cp_rank == 0:
        told = (
            f"{use} {'by columns' if chosen[use] else 'by rows'} "
            f"({1e3 * seconds[use, chosen[use]]:.2f} ms of {1e3 * seconds[use, not chosen[use]]:.2f})"
            for use in chosen
        )
        log.info("weights lie: %s", ", ".join(told) or "as they are")
    return replace(star_model, by_columns=chosen)


def _uses(star_model: FastStarModel) -> list[WeightUse]:
    """Of all weights, whole and, where there are ranks to divide them, in slices."""
    matrices = [(tuple(weight.shape), divides_rows) for _, weight, divides_rows in _matrices(star_model)]
    for module in star_model.model.modules():
        if isinstance(module, StackedExperts):
            matrices += [
                (tuple(weights.shape[1:]), name == "linear_fc2.weight")
                for name, weights in module.stacked.items()
                if weights.dim() == 3 and _matters_for(weights)
            ]
    sliced = (False, True) if star_model.exchange.cp_size > 1 else (False,)
    return list(
        dict.fromkeys(
            WeightUse(*shape, is_sliced, is_sliced and divides_rows)
            for shape, divides_rows in matrices
            for is_sliced in sliced
        )
    )


def _matrices(star_model: FastStarModel) -> Iterator[tuple[str, torch.nn.Parameter, bool]]:
    """Part, weight, and whether its rows are divided, of those whose layout matters; not of experts."""
    layers = [layer for of_part in star_model.slicing.layers.values() for layer in of_part]
    divided_by_rows = {id(layer.weight) for layer in layers if isinstance(layer, SummedLinear)}
    for part, weights in sliceable_weights(star_model).items():
        for weight in weights:
            if _matters_for(weight):
                yield part, weight, id(weight) in divided_by_rows


def _by_columns_unmeasured(use: WeightUse) -> bool:
    return use.divides_rows if use.is_sliced else use.num_columns >= use.num_rows


def _reading(use: WeightUse, by_columns: bool, star_model: FastStarModel) -> Callable[[], object]:
    """One token's products with weights of this kind, whose values do not matter."""
    num_columns = max(1, min(use.num_columns, MEASURED_BYTES // (4 * use.num_rows)))
    copies = max(1, min(MOST_COPIES, MEASURED_BYTES // (4 * num_columns * use.num_rows)))
    size = (use.num_rows, num_columns) if by_columns else (num_columns, use.num_rows)
    weights = [torch.ones(size).t() if by_columns else torch.ones(size) for _ in range(copies)]
    if use.is_sliced:
        share = even_range(use.num_rows if use.divides_rows else num_columns, star_model.exchange)
        weights = [weight[:, share] if use.divides_rows else weight[share] for weight in weights]
    row = torch.ones(1, weights[0].size(1))
    return lambda: [F.linear(row, weight) for weight in weights]


def _laid_out(weights: Tensor, *, by_columns: bool) -> Tensor:
    """As `lay_out`, of one weight or of a stack of them."""
    return weights.mT.contiguous().mT if by_columns else weights.contiguous()


def _matters_for(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype == torch.float32


def _lay_out_experts(experts: StackedExperts, star_model: FastStarModel, *, is_sliced: bool) -> None:
    """As other weights: the stack of each linear layer at once."""
    for name, weights in experts.stacked.items():
        if weights.dim() == 3 and _matters_for(weights):
            use = WeightUse(*weights.shape[1:], is_sliced, is_sliced and name == "linear_fc2.weight")
            by_columns = star_model.by_columns.get(use, _by_columns_unmeasured(use))
            experts.replace_stacked(name, _laid_out(weights, by_columns=by_columns))
