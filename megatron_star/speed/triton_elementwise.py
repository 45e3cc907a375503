"""Rotary embedding of queries and keys, and SwiGLU, each in one Triton kernel and in place.

What `model/rotary.py` does in eight operations, and `elementwise.py` in two: a token waits for starting them,
and a wave for memory. Values are rounded once, where the twins round after each operation.
Shapes: sq tokens of this pass, b = 1, hn head size, r pairs that are rotated, f hidden size of the MLP.
"""

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
COLUMNS = 1024


def rotate_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> None:
    """`rotary.rotate` of both, [sq, 1, heads, hn] with any strides but the last, which is 1."""
    num_rows, r = cos.size(0), cos.size(-1)
    assert query.size(1) == key.size(1) == query.stride(3) == key.stride(3) == 1
    assert cos.is_contiguous() and sin.is_contiguous() and query.size(0) == key.size(0) == num_rows
    if num_rows == 0:
        return
    heads = query.size(2), key.size(2)
    _rotate[(num_rows, triton.cdiv(heads[0], HEADS) + triton.cdiv(heads[1], HEADS))](
        query,
        key,
        cos,
        sin,
        *heads,
        r,
        query.stride(0),
        query.stride(2),
        key.stride(0),
        key.stride(2),
        num_heads=HEADS,
        num_pairs=triton.next_power_of_2(r),
        interleaved=interleaved,
    )


def swiglu_in_place(gate_and_up: Tensor) -> Tensor:
    """See `elementwise.swiglu_in_place`; [sq, 1, 2 * f], contiguous."""
    assert gate_and_up.is_contiguous()
    f = gate_and_up.size(-1) // 2
    num_rows = gate_and_up.numel() // (2 * f)
    if num_rows:
        _swiglu[(num_rows, triton.cdiv(f, COLUMNS))](gate_and_up, f, num_columns=COLUMNS)
    return gate_and_up[..., :f]


@triton.jit
def _rotate(
    query,
    key,
    cos,
    sin,
    np,
    ng,
    r,
    query_sq,
    query_np,
    key_sq,
    key_ng,
    num_heads: tl.constexpr,
    num_pairs: tl.constexpr,
    interleaved: tl.constexpr,
):
    """Some heads of one token, of its query or of its key; a name like `query_sq` is a stride."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_query_blocks = (np + num_heads - 1) // num_heads
    pairs = tl.arange(0, num_pairs)
    cosines = tl.load(cos + row * r + pairs, mask=pairs < r, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(sin + row * r + pairs, mask=pairs < r, other=0.0).to(tl.float32)[None, :]
    if block < num_query_blocks:
        heads = block * num_heads + tl.arange(0, num_heads)
        start = query + row * query_sq + heads[:, None] * query_np
        exists = (heads < np)[:, None] & (pairs < r)[None, :]
    else:
        heads = (block - num_query_blocks) * num_heads + tl.arange(0, num_heads)
        start = key + row * key_sq + heads[:, None] * key_ng
        exists = (heads < ng)[:, None] & (pairs < r)[None, :]
    if interleaved:
        first_place = start + 2 * pairs[None, :]
        second_place = first_place + 1
    else:
        first_place = start + pairs[None, :]
        second_place = first_place + r
    first = tl.load(first_place, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(second_place, mask=exists, other=0.0).to(tl.float32)
    tl.store(first_place, first * cosines - second * sines, mask=exists)
    tl.store(second_place, second * cosines + first * sines, mask=exists)


@triton.jit
def _swiglu(gate_and_up, f, num_columns: tl.constexpr):
    """Some columns of one row."""
    columns = tl.program_id(1) * num_columns + tl.arange(0, num_columns)
    gate_place = gate_and_up + tl.program_id(0).to(tl.int64) * 2 * f + columns
    gate = tl.load(gate_place, mask=columns < f, other=0.0).to(tl.float32)
    up = tl.load(gate_place + f, mask=columns < f, other=0.0).to(tl.float32)
    tl.store(gate_place, gate / (1.0 + tl.exp(-gate)) * up, mask=columns < f)
