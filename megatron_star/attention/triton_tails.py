"""Attention of a step's rows to the tails of all their sequences in one call, over addresses on the device.

Tails stay where they are: the host writes where that is, and how long they are, into one tensor a step. So
neither kernel asks the host for anything, and a CUDA graph can replay both for other tails and lengths.
What a row sees of a layer are a few segments: of its tail, and in a layer with a mask of its own the last
pieces of its context. The first segment is the tail's.

Shapes: sq rows of a step, b = 1, np query heads and ng KV heads of this TP rank, hn and hv head sizes of keys
and values. A token's heads lie side by side in memory: [ng, hn] and [ng, hv].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_star.attention.partial import Partial
from megatron_star.attention.tail_rows import TailRows

LEAST = 16
"""Rows, keys and values that one product of a GPU's matrix units has at least."""

TOKENS_OF_SPLIT = 512
"""With room for more tokens in a segment, several programs share a row's keys."""

MOST_SPLITS = 16

MOST_PROGRAMS = 512
"""With so many rows and heads no more programs are wanted: GPUs run 100 to 200 at once, and some wait."""


def append_rows(key: Tensor, value: Tensor, rows: TailRows) -> None:
    """Put each row's key [sq, 1, ng, hn] and value [sq, 1, ng, hv] into its tail, if that is on this rank."""
    sq, _, ng, hn = key.shape
    hv = value.size(3)
    assert key.stride(3) == value.stride(3) == 1
    _append[(sq, ng)](
        key,
        value,
        rows.slots,
        rows.bases,
        key.stride(0),
        key.stride(2),
        value.stride(0),
        value.stride(2),
        num_segments=rows.bases.size(1),
        key_size=hn,
        value_size=hv,
        key_block=triton.next_power_of_2(hn),
        value_block=triton.next_power_of_2(hv),
        num_warps=1,
    )


def attend_tails(
    query: Tensor,
    rows: TailRows,
    *,
    num_groups: int,
    softmax_scale: float,
    softcap: float | None = None,
    value_size: int | None = None,
    start: Partial | None = None,
) -> Partial:
    """Attention of each row to its segments, going on from a partial over other keys.

    Args:
        query: [sq, 1, np, hn].
        num_groups: ng.
        softcap: scores become softcap * tanh(score / softcap).
        value_size: hv, where it is not hn.
        start: of all rows, out in any float dtype; rows that have seen nothing have an LSE of -inf.

    Returns:
        In float32, over all keys.
    """
    sq, _, np, hn = query.shape
    hv = value_size or hn
    num_splits = num_splits_for(rows.most_keys, sq * num_groups)
    out, lse = _empty_parts(query, num_splits, hv)
    started = start or Partial(out[0].transpose(0, 1)[None], lse[0].t()[None])  # not read without a start
    assert query.stride(3) == started.out.stride(3) == 1
    hn_block, hv_block = (max(LEAST, triton.next_power_of_2(size)) for size in (hn, hv))
    _attend[(sq, num_groups, num_splits)](
        query,
        rows.spans,
        rows.bases,
        *started,
        out,
        lse,
        softmax_scale,
        query.stride(0),
        query.stride(2),
        *started.out.stride()[1:3],
        *started.softmax_lse.stride()[1:],
        num_segments=rows.spans.size(1),
        heads=np // num_groups,
        key_size=hn,
        value_size=hv,
        head_block=max(LEAST, triton.next_power_of_2(np // num_groups)),
        key_block=hn_block,
        value_block=hv_block,
        num_keys=64 if max(hn_block, hv_block) * query.element_size() <= 256 else 32,
        num_splits=num_splits,
        softcap=softcap or 0.0,
        has_start=start is not None,
        num_stages=2,
    )
    merged = (out[0], lse[0]) if num_splits == 1 else merge_splits(out, lse)
    return Partial(merged[0].transpose(0, 1)[None], merged[1].t()[None])


def num_splits_for(most_keys: int, num_programs: int) -> int:
    """Programs that share a row's keys in one KV head: a power of two."""
    wanted = triton.next_power_of_2(triton.cdiv(max(1, most_keys), TOKENS_OF_SPLIT))
    return max(1, min(wanted, MOST_SPLITS, triton.next_power_of_2(MOST_PROGRAMS // max(1, num_programs))))


def _empty_parts(query: Tensor, num_parts: int, value_size: int) -> tuple[Tensor, Tensor]:
    """[parts, sq, np, hv] and their LSEs [parts, sq, np], float32."""
    sq, _, np, _ = query.shape
    out = query.new_empty(num_parts, sq, np, value_size, dtype=torch.float32)
    return out, query.new_empty(num_parts, sq, np, dtype=torch.float32)


def merge_splits(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge.merge_parts` of splits [splits, sq, np, hv] and [splits, sq, np] in one kernel."""
    num_splits, sq, np, hv = outs.shape
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    _merge[(sq * np,)](
        outs,
        lses,
        out,
        lse,
        num_splits=num_splits,
        value_size=hv,
        value_block=triton.next_power_of_2(hv),
        num_warps=1,
    )
    return out, lse


@triton.jit
def _append(
    key,
    value,
    slots,
    bases,
    key_row,
    key_head,
    value_row,
    value_head,
    num_segments: tl.constexpr,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
):
    """One head of one row; a name like `key_row` is the stride of `key` from row to row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    slot = tl.load(slots + row)
    bases += row * num_segments * 2
    place = slot * num_heads + head

    columns = tl.arange(0, key_block)
    exists = (columns < key_size) & (slot >= 0)
    to = tl.load(bases).to(tl.pointer_type(key.dtype.element_ty)) + place * key_size + columns
    tl.store(to, tl.load(key + row * key_row + head * key_head + columns, mask=exists), mask=exists)

    columns = tl.arange(0, value_block)
    exists = (columns < value_size) & (slot >= 0)
    to = tl.load(bases + 1).to(tl.pointer_type(value.dtype.element_ty)) + place * value_size + columns
    tl.store(to, tl.load(value + row * value_row + head * value_head + columns, mask=exists), mask=exists)


@triton.jit(do_not_specialize=["start_row", "start_lse_head", "start_lse_row"])
def _attend(
    query,
    spans,
    bases,
    start_out,
    start_lse,
    out,
    lse,
    softmax_scale,
    query_row,
    query_head,
    start_head,
    start_row,
    start_lse_head,
    start_lse_row,
    num_segments: tl.constexpr,
    heads: tl.constexpr,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    head_block: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    num_keys: tl.constexpr,
    num_splits: tl.constexpr,
    softcap: tl.constexpr,
    has_start: tl.constexpr,
):
    """The query heads of one KV head in one row, over its part of each segment.

    out and lse are [splits, sq, np, value_size] and [splits, sq, np]; the first split goes on from the start.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    split = tl.program_id(2)
    num_groups = tl.num_programs(1)
    head = group * heads + tl.arange(0, head_block)
    head_exists = tl.arange(0, head_block) < heads
    key_columns = tl.arange(0, key_block)
    value_columns = tl.arange(0, value_block)
    out_exists = head_exists[:, None] & (value_columns < value_size)[None, :]

    of_head = query + row * query_row + head.to(tl.int64)[:, None] * query_head
    q = tl.load(
        of_head + key_columns[None, :],
        mask=head_exists[:, None] & (key_columns < key_size)[None, :],
        other=0.0,
    )
    highest = tl.full([head_block], float("-inf"), tl.float32)
    total = tl.full([head_block], 0.0, tl.float32)
    summed = tl.full([head_block, value_block], 0.0, tl.float32)
    if has_start:
        is_first = head_exists & (split == 0)
        lses = start_lse + row * start_lse_row + head.to(tl.int64) * start_lse_head
        highest = tl.load(lses, mask=is_first, other=float("-inf"))
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
        outs = start_out + row * start_row + head.to(tl.int64)[:, None] * start_head
        started = tl.load(outs + value_columns[None, :], mask=out_exists & (split == 0), other=0.0)
        summed = tl.where(total[:, None] > 0, started.to(tl.float32), 0.0)

    spans += row * num_segments * 2
    bases += row * num_segments * 2
    for segment in range(num_segments):
        first = tl.load(spans + 2 * segment)
        length = tl.load(spans + 2 * segment + 1).to(tl.int32)
        # A part of whole products for each split; the last ones may have none.
        in_split = num_splits * num_keys
        part = (length + in_split - 1) // in_split * num_keys
        end = tl.minimum(length, (split + 1) * part)
        keys = tl.load(bases + 2 * segment).to(tl.pointer_type(query.dtype.element_ty))
        values = tl.load(bases + 2 * segment + 1).to(tl.pointer_type(query.dtype.element_ty))
        keys += (first * num_groups + group) * key_size
        values += (first * num_groups + group) * value_size
        if key_size % 8 == 0 and value_size % 8 == 0:  # then a head begins at a multiple of 16 bytes
            keys = tl.multiple_of(keys, 16)
            values = tl.multiple_of(values, 16)
        for begin in range(split * part, end, num_keys):
            token = begin + tl.arange(0, num_keys)
            token_exists = token < end
            place = token.to(tl.int64) * num_groups
            k = tl.load(
                keys + place[None, :] * key_size + key_columns[:, None],
                mask=token_exists[None, :] & (key_columns < key_size)[:, None],
                other=0.0,
            )
            scores = tl.dot(q, k, input_precision="ieee") * softmax_scale
            if softcap > 0:
                scores = softcap * (2 / (1 + tl.exp(-2 / softcap * scores)) - 1)  # tanh
            scores = tl.where(token_exists[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            shrunk = tl.exp(highest - higher)  # the first token exists: `higher` is finite
            weights = tl.exp(scores - higher[:, None])
            v = tl.load(
                values + place[:, None] * value_size + value_columns[None, :],
                mask=token_exists[:, None] & (value_columns < value_size)[None, :],
                other=0.0,
            )
            total = total * shrunk + tl.sum(weights, 1)
            summed = summed * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            highest = higher

    row_of_out = (split * tl.num_programs(0) + row) * num_groups * heads + head
    has_seen = total > 0
    divisor = tl.where(has_seen, total, 1.0)
    tl.store(lse + row_of_out, tl.where(has_seen, highest + tl.log(divisor), float("-inf")), mask=head_exists)
    tl.store(
        out + row_of_out[:, None] * value_size + value_columns[None, :],
        summed / divisor[:, None],
        mask=out_exists,
    )


@triton.jit
def _merge(
    outs,
    lses,
    out,
    lse,
    num_splits: tl.constexpr,
    value_size: tl.constexpr,
    value_block: tl.constexpr,
):
    """One head of one row."""
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    splits = tl.arange(0, num_splits).to(tl.int64) * num_rows + row
    columns = tl.arange(0, value_block)
    exists = columns < value_size
    of_splits = tl.load(lses + splits)
    highest = tl.max(of_splits, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(of_splits - shift)
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0, total, 1.0)
    values = tl.load(outs + splits[:, None] * value_size + columns[None, :], mask=exists[None, :], other=0.0)
    tl.store(out + row * value_size + columns, tl.sum(values * (weights / divisor)[:, None], 0), mask=exists)
    tl.store(lse + row, tl.where(total > 0, shift + tl.log(divisor), float("-inf")))
