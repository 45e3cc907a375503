"""What the kernels over addresses have to do, asked in Triton's interpreter and on a GPU alike."""

from typing import NamedTuple

import torch
from reference import attention
from torch import Tensor

from megatron_star.attention.partial import Partial
from megatron_star.attention.tail_rows import TailRows

SCALE = 0.3


class Shape(NamedTuple):
    """Of heads, and for each row the keys that it sees of each segment; the first is its tail's."""

    num_heads: int
    num_groups: int
    key_size: int
    value_size: int
    lengths: list[list[int]]
    most_keys: int = 100
    softcap: float | None = None

    def tokens(self, num_tokens: int, size: int, like: Tensor) -> Tensor:
        """Random [tokens, 1, ng, size]."""
        random = torch.randn(num_tokens, 1, self.num_groups, size)
        return random.to(like.device, like.dtype)


SHAPES = [
    Shape(4, 2, 16, 16, [[5], [0], [70]]),
    Shape(8, 2, 24, 20, [[5, 3], [0, 0], [130, 1]]),
    Shape(5, 5, 8, 8, [[5, 0, 9], [0, 0, 1], [70, 64, 65]], most_keys=2000, softcap=30.0),
    Shape(6, 1, 80, 48, [[600], [0], [1]], most_keys=2000, softcap=2.0),
    Shape(3, 1, 12, 12, [[7]]),
]


def check(kernels: object, shape: Shape, like: Tensor, tolerance: float, *, starts: bool) -> None:
    """Rows go to their tails, and see their segments, after a start that is NaN where it has seen nothing.

    kernels: the module `megatron_star.attention.triton_tails`.
    """
    torch.manual_seed(0)
    num_rows, first = len(shape.lengths), 2
    held = [
        [_padded(shape, length, like, first) for length in row] for row in shape.lengths
    ]  # [row][segment] of (key, value)
    rows = _rows(shape, held, first, like)
    query = torch.randn(num_rows, 1, shape.num_heads, shape.key_size).to(like)
    start = _start(shape, like) if starts else None
    _append(kernels, shape, rows, held, like)
    part = kernels.attend_tails(
        query,
        rows,
        num_groups=shape.num_groups,
        softmax_scale=SCALE,
        softcap=shape.softcap,
        value_size=shape.value_size,
        start=start,
    )
    assert part.out.dtype == torch.float32
    for row, lengths in enumerate(shape.lengths):
        pairs = zip(held[row], lengths, strict=True)
        seen = [tuple(each[first : first + n] for each in key_value) for key_value, n in pairs]
        key, value = (torch.cat([piece[i] for piece in seen]) for i in (0, 1))
        expected = attention(query[row : row + 1], key, value, softmax_scale=SCALE, softcap=shape.softcap)
        if start:
            expected = _merged(*expected, *(each[:, :, row : row + 1].double() for each in start))
        for found, wanted in zip(part, expected, strict=True):
            torch.testing.assert_close(
                found[:, :, row : row + 1].double(), wanted, atol=tolerance, rtol=tolerance
            )


def _padded(shape: Shape, num_tokens: int, like: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Keys and values, NaN around them."""
    key, value = (
        torch.full((first + num_tokens + 3, 1, shape.num_groups, size), torch.nan).to(like)
        for size in (shape.key_size, shape.value_size)
    )
    for each in (key, value):
        each[first : first + num_tokens] = shape.tokens(num_tokens, each.size(3), like)
    return key, value


def _rows(shape: Shape, held: list, first: int, like: Tensor) -> TailRows:
    """The last key that a row sees of its tail is its own; a row without a tail has no address."""
    slots = [first + lengths[0] - 1 if lengths[0] else -1 for lengths in shape.lengths]
    spans = [[[first, n] if n else [0, 0] for n in lengths] for lengths in shape.lengths]
    bases = [
        [[each.data_ptr() if n else 0 for each in kv] for kv, n in zip(row, lengths, strict=True)]
        for row, lengths in zip(held, shape.lengths, strict=True)
    ]
    tensors = (torch.tensor(each, dtype=torch.int64, device=like.device) for each in (slots, spans, bases))
    return TailRows(*tensors, shape.most_keys)


def _append(kernels: object, shape: Shape, rows: TailRows, held: list, like: Tensor) -> None:
    """From strided tensors; nothing else changes."""
    num_rows = len(shape.lengths)
    key, value = (
        shape.tokens(num_rows, size + 3, like)[..., :size] for size in (shape.key_size, shape.value_size)
    )
    before = [[each.clone() for each in segments[0]] for segments in held]
    kernels.append_rows(key, value, rows)
    for row, (slot, expected) in enumerate(zip(rows.slots.tolist(), before, strict=True)):
        for found, wanted, new in zip(held[row][0], expected, (key, value), strict=True):
            if slot >= 0:
                wanted[slot] = new[row]
            torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)


def _start(shape: Shape, like: Tensor) -> Partial:
    """Of other keys; the first head of each row has seen none."""
    num_rows = len(shape.lengths)
    out = torch.randn(num_rows, 1, shape.num_heads, shape.value_size).to(like).permute(1, 2, 0, 3)
    lse = torch.randn(1, shape.num_heads, num_rows, device=like.device)
    lse[:, 0], out[:, 0] = -torch.inf, torch.nan
    return Partial(out, lse)


def _merged(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, other_lse)
    weights = ((each - total).exp().nan_to_num(0.0).unsqueeze(-1) for each in (lse, other_lse))
    outs = (out, other_out.nan_to_num(0.0))
    return sum(w * o for w, o in zip(weights, outs, strict=True)), total
