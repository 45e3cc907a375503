"""Let Megatron-Core run on a machine without CUDA, and not slowly."""

from collections.abc import Iterable

import torch


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


def lay_out_by_columns(weights: Iterable[torch.nn.Parameter]) -> None:
    """Lay weights [columns, rows] out in memory so that a row's values for all columns are neighbors.

    One token's product is then a sum of scaled vectors instead of many short dot products: up to twice as
    fast in float32 on a CPU. Many tokens' products take as long as before; looking a token up in a tied
    embedding takes some 10 us longer. Shapes and values stay; one weight is copied at a time. Weights with
    fewer columns than rows stay as they lie: the many short vectors would take longer.
    """
    for weight in weights:
        columns, rows = weight.shape
        if columns >= rows:
            weight.data = weight.data.t().contiguous().t()
