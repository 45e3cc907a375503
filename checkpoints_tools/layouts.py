"""Fuse Hugging Face tensors into a Megatron tensor, and split it again: the only place that knows how.

np query heads, ng key-value heads (query groups), hn head size.
"""

import torch
from torch import Tensor

from checkpoints_tools.chunks import Shape
from checkpoints_tools.families.weights import AS_IS, QKV, VOCABULARY


def fuse(layout: str, parts: list[Tensor], shape: Shape, num_query_groups: int) -> Tensor:
    """One tensor of `shape` from its parts.

    QKV: for each query group its query heads, its key head, its value head. VOCABULARY: zero rows are
    added up to `shape`.
    """
    if layout == AS_IS:
        return parts[0]
    if layout == QKV:
        by_group = [part.unflatten(0, (num_query_groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    assert layout == VOCABULARY
    if parts[0].shape == shape:
        return parts[0]
    padded = parts[0].new_zeros(shape)
    padded[: len(parts[0])] = parts[0]
    return padded


def split(layout: str, fused: Tensor, shapes: list[Shape], num_query_groups: int) -> list[Tensor]:
    """The inverse of `fuse`: parts of the given shapes, contiguous."""
    if layout == AS_IS:
        return [fused]
    if layout == QKV:
        by_group = fused.unflatten(0, (num_query_groups, -1))
        parts = by_group.split([shape[0] // num_query_groups for shape in shapes], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    assert layout == VOCABULARY
    return [fused[: shapes[0][0]]]
