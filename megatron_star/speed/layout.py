"""How weights lie in memory: as token generation reads them fastest."""

import torch

from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.processor import IS_AMD
from megatron_star.speed.sliced_linear import NO_PARTS, SummedLinear


def sliceable_weights(star_model: FastStarModel) -> dict[str, list[torch.nn.Parameter]]:
    """By part, the weights that can be sliced: all but those of TransformerEngine's layers and of experts."""
    model = star_model.model
    weights = {part: [layer.weight for layer in layers] for part, layers in star_model.slicing.layers.items()}
    output = model.output_layer.weight
    tied = output is None
    return weights | {"output": [model.shared_embedding_or_output_weight() if tied else output]}


def lay_out_for_reading(star_model: FastStarModel, sliced_parts: frozenset[str] = NO_PARTS) -> None:
    """Lay weights out as token generation reads them fastest, where that matters: float32 on a CPU.

    A slice lies in one piece, except on a processor of AMD, where by columns (`lay_out`) matters more.
    """
    layers = [layer for of_part in star_model.slicing.layers.values() for layer in of_part]
    sliced_by_rows = {id(layer.weight) for layer in layers if isinstance(layer, SummedLinear)}
    for part, weights in sliceable_weights(star_model).items():
        if (weights[0].device.type, weights[0].dtype) != ("cpu", torch.float32):
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
    data = weight.data
    weight.data = data.t().contiguous().t() if by_columns else data.contiguous()
