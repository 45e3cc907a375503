"""How weights lie in memory: as token generation reads them fastest."""

import torch
from torch import Tensor

from megatron_star.model.grouped_experts import StackedExperts
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.processor import IS_AMD
from megatron_star.speed.sliced_linear import EXPERTS, NO_PARTS, SummedLinear


def sliceable_weights(star_model: FastStarModel) -> dict[str, list[torch.nn.Parameter]]:
    """By part, the weights that can be sliced, but those of experts: all but TransformerEngine's layers'."""
    model = star_model.model
    weights = {part: [layer.weight for layer in layers] for part, layers in star_model.slicing.layers.items()}
    output = model.output_layer.weight
    tied = output is None
    return weights | {"output": [model.shared_embedding_or_output_weight() if tied else output]}


def lay_out_for_reading(star_model: FastStarModel, sliced_parts: frozenset[str] = NO_PARTS) -> None:
    """Lay weights out as token generation reads them fastest, where that matters: float32 on a CPU.

    A slice lies in one piece, except on a processor of AMD, where by columns (`lay_out`) matters more.
    """
    for module in star_model.model.modules():
        if isinstance(module, StackedExperts):
            _lay_out_experts(module, is_sliced=EXPERTS in sliced_parts)
    layers = [layer for of_part in star_model.slicing.layers.values() for layer in of_part]
    sliced_by_rows = {id(layer.weight) for layer in layers if isinstance(layer, SummedLinear)}
    for part, weights in sliceable_weights(star_model).items():
        if not _matters_for(weights[0]):
            continue
        for weight in weights:
            if part in sliced_parts and not IS_AMD:
                by_columns = id(weight) in sliced_by_rows
            else:
                by_columns = weight.size(0) >= weight.size(1)
            lay_out(weight, by_columns=by_columns)


def lay_out(weight: torch.nn.Parameter, *, by_columns: bool) -> None:
    """Lay a weight [columns, rows] out in memory; its shape and values stay.

    By columns, a row's values for all columns are neighbors, and one token's product is a sum of scaled
    vectors; else a column's values for all rows are, and it is many dot products. By columns is up to twice
    as fast in float32 on a processor of AMD, and as fast on one of Intel; with fewer columns than rows the
    many short vectors take longer. Many tokens' products take as long either way.
    """
    weight.data = _laid_out(weight.data, by_columns=by_columns)


def _laid_out(weights: Tensor, *, by_columns: bool) -> Tensor:
    """As `lay_out`, of one weight or of a stack of them."""
    return weights.mT.contiguous().mT if by_columns else weights.contiguous()


def _matters_for(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype == torch.float32


def _lay_out_experts(experts: StackedExperts, *, is_sliced: bool) -> None:
    """As other weights: the stack of each linear layer at once."""
    for name, weights in experts.stacked.items():
        if weights.dim() == 3 and _matters_for(weights):
            if is_sliced and not IS_AMD:
                by_columns = name == "linear_fc2.weight"
            else:
                by_columns = weights.size(1) >= weights.size(2)
            experts.replace_stacked(name, _laid_out(weights, by_columns=by_columns))
