"""Let Megatron-Core run on a machine without CUDA, and not slowly."""

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_BYTES = 1 << 20
"""Of the cache that a core has for itself (1 MB or more since 2018), what a piece of work may take."""


def use_cpu_where_cuda_is_absent() -> torch.device:
    """Make `torch.cuda.current_device()` name the CPU if there is no GPU; return the device to use.

    Megatron-Core asks for the current CUDA device in about ten places on the inference path (rotary
    embeddings, gathers over the TP group), always as a `device=` argument, where a `torch.device` also fits.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    return cpu


def lay_out(weight: torch.nn.Parameter, *, by_columns: bool) -> None:
    """Lay a weight [columns, rows] out in memory; its shape and values stay.

    By columns, a row's values for all columns are neighbors, and one token's product is a sum of scaled
    vectors; else a column's values for all rows are, and it is many dot products. By columns is up to twice
    as fast in float32 on a processor of AMD, and as fast on one of Intel; with fewer columns than rows the
    many short vectors take longer. Many tokens' products take as long either way.
    """
    data = weight.data
    weight.data = data.t().contiguous().t() if by_columns else data.contiguous()


def cache_sized_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of these tensors' next rows (first dimension), so many that a CPU's cache holds them.

    Several operations on a piece, one after the other, then go over memory once. On another device, and where
    there are few rows, one piece is everything.
    """
    num_rows = tensors[0].size(0)
    row_bytes = sum(tensor.nbytes for tensor in tensors) // max(1, num_rows)
    rows = max(1, CACHE_BYTES // max(1, row_bytes)) if tensors[0].device.type == "cpu" else num_rows
    if rows >= num_rows:
        yield tensors
    else:
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
