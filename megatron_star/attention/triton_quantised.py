"""Few rows attend to keys and values in 8 bits on CUDA: the keys are split over programs, and their parts are
merged (Flash-Decoding). Products are taken in the model's dtype, in which all int8 and float8_e4m3fn numbers
are exact; the scales are applied to scores and weights.

Shapes: sq rows, b = 1, np query heads and ng KV heads of this TP rank, hn and hv head sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_star.attention.partial import Partial
from megatron_star.attention.quantised_kv import QuantisedTensor
from megatron_star.attention.triton_tails import LEAST, merge_splits

MOST_ROWS = 64
"""Of a KV head: its query heads times the rows of each."""

KEYS_AT_ONCE = 64
TOKENS_OF_SPLIT = 512
MOST_PROGRAMS = 1024


def attend(
    query: Tensor, key: QuantisedTensor, value: QuantisedTensor, softmax_scale: float, dtype: torch.dtype
) -> Partial:
    """See `AttendQuantised`."""
    sq, _, np, hn = query.shape
    num_tokens, _, ng, hv = value.numbers.shape
    num_splits = _num_splits(num_tokens, ng)
    out = query.new_empty(num_splits, sq, np, hv, dtype=torch.float32)
    lse = query.new_empty(num_splits, sq, np, dtype=torch.float32)
    stored = (*key, *value)
    assert query.is_contiguous() and all(each.is_contiguous() for each in stored)
    _attend[(num_splits, ng)](
        query,
        *stored,
        out,
        lse,
        softmax_scale,
        num_tokens,
        num_rows=sq,
        heads=np // ng,
        key_size=hn,
        value_size=hv,
        row_block=max(LEAST, triton.next_power_of_2(sq * np // ng)),
        key_block=max(LEAST, triton.next_power_of_2(hn)),
        value_block=max(LEAST, triton.next_power_of_2(hv)),
        num_keys=KEYS_AT_ONCE,
        num_splits=num_splits,
        dtype=getattr(tl, str(dtype).removeprefix("torch.")),
        num_stages=2,
    )
    merged_out, merged_lse = (out[0], lse[0]) if num_splits == 1 else merge_splits(out, lse)
    return Partial(merged_out.transpose(0, 1)[None], merged_lse.t()[None])


def _num_splits(num_tokens: int, num_groups: int) -> int:
    """Programs that share the keys of one KV head: a power of two."""
    wanted = triton.next_power_of_2(triton.cdiv(num_tokens, TOKENS_OF_SPLIT))
    return max(1, min(wanted, triton.next_power_of_2(MOST_PROGRAMS // num_groups)))


@triton.jit
def _attend(
    query,
    key,
    key_scale,
    value,
    value_scale,
    out,
    lse,
    softmax_scale,
    num_tokens,
    num_rows: tl.constexpr,
    heads: tl.constexpr,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    row_block: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    num_keys: tl.constexpr,
    num_splits: tl.constexpr,
    dtype: tl.constexpr,
):
    """All rows of the query heads of one KV head, over one part of the keys.

    query is [sq, np, key_size], out and lse are [splits, sq, np, value_size] and [splits, sq, np].
    """
    split = tl.program_id(0)
    group = tl.program_id(1)
    num_groups = tl.num_programs(1)
    row = tl.arange(0, row_block)
    row_exists = row < num_rows * heads
    place = (row // heads) * (num_groups * heads) + group * heads + row % heads
    key_columns = tl.arange(0, key_block)
    value_columns = tl.arange(0, value_block)

    q = tl.load(
        query + place[:, None] * key_size + key_columns[None, :],
        mask=row_exists[:, None] & (key_columns < key_size)[None, :],
        other=0.0,
    ).to(dtype)
    highest = tl.full([row_block], float("-inf"), tl.float32)
    total = tl.zeros([row_block], tl.float32)
    summed = tl.zeros([row_block, value_block], tl.float32)

    # Whole products for each split; the last ones may have none.
    part = tl.cdiv(tl.cdiv(num_tokens, num_splits), num_keys) * num_keys
    for begin in range(split * part, tl.minimum(num_tokens, (split + 1) * part), num_keys):
        token = begin + tl.arange(0, num_keys)
        exists = token < num_tokens
        head = token.to(tl.int64) * num_groups + group
        k = tl.load(
            key + head[None, :] * key_size + key_columns[:, None],
            mask=exists[None, :] & (key_columns < key_size)[:, None],
            other=0.0,
        )
        factor = tl.load(key_scale + head, mask=exists, other=0.0) * softmax_scale
        scores = tl.dot(q, k.to(dtype), input_precision="ieee") * factor[None, :]
        scores = tl.where(exists[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrunk = tl.exp(highest - higher)  # the first token exists: `higher` is finite
        weights = tl.exp(scores - higher[:, None])
        v = tl.load(
            value + head[:, None] * value_size + value_columns[None, :],
            mask=exists[:, None] & (value_columns < value_size)[None, :],
            other=0.0,
        )
        total = total * shrunk + tl.sum(weights, 1)
        scaled = weights * tl.load(value_scale + head, mask=exists, other=0.0)[None, :]
        summed = summed * shrunk[:, None] + tl.dot(scaled.to(dtype), v.to(dtype), input_precision="ieee")
        highest = higher

    row_of_out = split * num_rows * num_groups * heads + place
    has_seen = total > 0
    divisor = tl.where(has_seen, total, 1.0)
    tl.store(lse + row_of_out, tl.where(has_seen, highest + tl.log(divisor), float("-inf")), mask=row_exists)
    tl.store(
        out + row_of_out[:, None] * value_size + value_columns[None, :],
        summed / divisor[:, None],
        mask=row_exists[:, None] & (value_columns < value_size)[None, :],
    )
