"""Casts that lose no value: what is not a number, or does not fit, is refused by the tensor's name."""

import torch
from torch import Tensor

from megatron_star.model.stored_weights import has_only_numbers


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype, or itself.

    Raises:
        ValueError: a value is NaN or infinite, before or after the cast.
    """
    found = value.to(dtype)
    if has_only_numbers(found):
        return found
    if not has_only_numbers(value):
        raise ValueError(f"{name} holds values that are not finite numbers: the checkpoint is damaged")
    largest = value.abs().max().item()
    raise ValueError(
        f"{name} has a value of {largest:g}, more than {torch.finfo(dtype).max:g}: too large for {dtype}"
    )
