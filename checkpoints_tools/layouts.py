"""Fuse Hugging Face tensors into a Megatron tensor, and split it again: the only place that knows how.

np query heads, ng key-value heads (query groups), hn head size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints_tools.chunks import Shape
from checkpoints_tools.families.weight import (
    AS_IS,
    KEY_HALVES,
    PAIRS,
    QKV,
    QKV_ROWS,
    QUERY_HALVES,
    TURNED,
    TURNED_PAIRS,
    VOCABULARY,
)


class Heads(NamedTuple):
    """How many heads a model has, np and ng; and of latent attention, how many values of each are rotated."""

    query: int
    key_value: int
    rotated: int = 0


def heads_of(args: Mapping[str, Any]) -> Heads:
    """Of a model in Megatron's argument names."""
    rotated = args.get("qk_pos_emb_head_dim") or 0
    return Heads(args["num_attention_heads"], args["num_query_groups"], rotated)


def fuse(layout: str, parts: list[Tensor], shape: Shape, heads: Heads) -> Tensor:
    """One tensor of `shape` from its parts.

    QKV: for each query group its query heads, its key head, its value head. QKV_ROWS: the same, of one part
    with the rows of all query heads, of all key heads, of all value heads. VOCABULARY: zero rows are added
    up to `shape`. TURNED: the transpose. PAIRS: the even values (of the gate), then the odd ones.
    TURNED_PAIRS: of the transpose the even rows, then the odd ones.
    QUERY_HALVES, KEY_HALVES: of latent attention; of each query head, or of the one key, the last values are
    rotated, and those that are rotated together come to lie side by side.
    """
    if layout == AS_IS:
        return parts[0]
    if layout in (QUERY_HALVES, KEY_HALVES):
        return _side_by_side(parts[0], heads.query if layout == QUERY_HALVES else 1, heads.rotated)
    if layout in (TURNED, TURNED_PAIRS, PAIRS):
        return _of_expert(layout, parts[0])
    if layout == QKV_ROWS:
        return _by_group(_rows_of_each(parts[0], heads), heads)
    if layout == QKV:
        return _by_group(parts, heads)
    assert layout == VOCABULARY
    if parts[0].shape == shape:
        return parts[0]
    padded = parts[0].new_zeros(shape)
    padded[: len(parts[0])] = parts[0]
    return padded


def split(layout: str, fused: Tensor, shapes: list[Shape], heads: Heads) -> list[Tensor]:
    """The inverse of `fuse`: parts of the given shapes, contiguous."""
    if layout == AS_IS:
        return [fused.view(shapes[0])]
    if layout in (QUERY_HALVES, KEY_HALVES):
        return [_in_halves(fused, heads.query if layout == QUERY_HALVES else 1, heads.rotated)]
    if layout in (TURNED, TURNED_PAIRS, PAIRS):
        return [_of_expert_back(layout, fused)]
    if layout == QKV_ROWS:
        return [torch.cat(_by_kind(fused, heads))]
    if layout == QKV:
        return _by_kind(fused, heads)
    assert layout == VOCABULARY
    return [fused[: shapes[0][0]]]


def _of_expert(layout: str, part: Tensor) -> Tensor:
    turned = part if layout == PAIRS else part.t()
    return turned.contiguous() if layout == TURNED else torch.cat((turned[::2], turned[1::2]))


def _of_expert_back(layout: str, fused: Tensor) -> Tensor:
    """The inverse of `_of_expert`."""
    if layout != TURNED:
        fused = torch.stack(fused.chunk(2), dim=1).flatten(0, 1)
    return fused if layout == PAIRS else fused.t().contiguous()


def _rows_of_each(fused: Tensor, heads: Heads) -> list[Tensor]:
    """Views of the queries', the keys' and the values' rows, which lie in this order."""
    head = len(fused) // (heads.query + 2 * heads.key_value)
    return list(fused.split([head * heads.query, head * heads.key_value, head * heads.key_value]))


def _by_group(parts: list[Tensor], heads: Heads) -> Tensor:
    by_group = [part.unflatten(0, (heads.key_value, -1)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _by_kind(fused: Tensor, heads: Heads) -> list[Tensor]:
    """The inverse of `_by_group`."""
    by_group = fused.unflatten(0, (heads.key_value, -1))
    queries = heads.query // heads.key_value
    head = by_group.shape[1] // (queries + 2)
    parts = by_group.split([queries * head, head, head], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]


def _side_by_side(rows: Tensor, num_heads: int, rotated: int) -> Tensor:
    """The last `rotated` rows of each head: i and i + rotated / 2 become 2 i and 2 i + 1."""
    plain, halves = rows.unflatten(0, (num_heads, -1)).tensor_split([-rotated], dim=1)
    pairs = torch.stack(halves.chunk(2, dim=1), dim=2).flatten(1, 2)
    return torch.cat((plain, pairs), dim=1).flatten(0, 1)


def _in_halves(rows: Tensor, num_heads: int, rotated: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    plain, pairs = rows.unflatten(0, (num_heads, -1)).tensor_split([-rotated], dim=1)
    return torch.cat((plain, pairs[:, ::2], pairs[:, 1::2]), dim=1).flatten(0, 1)
