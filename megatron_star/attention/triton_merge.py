"""`merge.merge_into` in one Triton kernel: each value is read once and written once.

Shapes: out [b, np, sq, hn], LSE [b, np, sq], any strides but the last of out, which is 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_star.attention.partial import Partial

ROWS = 16


def merge_into(out: Tensor, softmax_lse: Tensor, part: Partial) -> None:
    """See `merge.merge_into`."""
    b, np, sq, hn = out.shape
    assert part.out.shape == out.shape and out.stride(3) == part.out.stride(3) == 1
    if out.numel() == 0:
        return
    _merge_rows[(triton.cdiv(sq, ROWS), b * np)](
        out,
        softmax_lse,
        part.out,
        part.softmax_lse,
        np,
        sq,
        hn,
        *out.stride()[:3],
        *softmax_lse.stride(),
        *part.out.stride()[:3],
        *part.softmax_lse.stride(),
        num_rows=ROWS,
        num_columns=triton.next_power_of_2(hn),
    )


@triton.jit
def _merge_rows(
    out,
    lse,
    part_out,
    part_lse,
    np,
    sq,
    hn,
    out_b,
    out_np,
    out_sq,
    lse_b,
    lse_np,
    lse_sq,
    part_out_b,
    part_out_np,
    part_out_sq,
    part_lse_b,
    part_lse_np,
    part_lse_sq,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
):
    """Rows of one head of one batch entry; a name like `out_sq` is the stride of `out` along sq."""
    b = (tl.program_id(1) // np).to(tl.int64)
    head = (tl.program_id(1) % np).to(tl.int64)
    rows = (tl.program_id(0) * num_rows + tl.arange(0, num_rows)).to(tl.int64)
    columns = tl.arange(0, num_columns)
    row_exists = rows < sq
    exists = row_exists[:, None] & (columns < hn)[None, :]
    lse += b * lse_b + head * lse_np + rows * lse_sq
    part_lse += b * part_lse_b + head * part_lse_np + rows * part_lse_sq
    out += (b * out_b + head * out_np + rows * out_sq)[:, None] + columns[None, :]
    part_out += (b * part_out_b + head * part_out_np + rows * part_out_sq)[:, None] + columns[None, :]

    old_lse = tl.load(lse, mask=row_exists, other=0.0)
    new_lse = tl.load(part_lse, mask=row_exists, other=0.0)
    highest = tl.maximum(old_lse, new_lse)
    # Where neither part holds a key, both exponentials are 0 instead of NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    new_weight = tl.exp(new_lse - shift)
    total = tl.exp(old_lse - shift) + new_weight
    weight = tl.where(total > 0, new_weight / total, 0.0)
    old = tl.load(out, mask=exists, other=0.0)
    new = tl.load(part_out, mask=exists, other=0.0).to(tl.float32)
    tl.store(out, old + weight[:, None] * (new - old), mask=exists)
    tl.store(lse, shift + tl.log(total), mask=row_exists)
