"""Decode quantised weights: the values that they stand for.

FP8: a float8_e4m3fn times the scale of its block, row or tensor. MXFP4: pairs of 4-bit values (E2M1), 32 with
one power of two (OCP Microscaling Formats 1.0).
"""

import torch
from torch import Tensor

from checkpoints_tools.chunks import Shape

MXFP4_GROUP = 32  # values with one scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of an exponent that is stored as a byte
_ROWS_AT_A_TIME = 256


def scale_grid(weight: Shape, scale: Shape, block: tuple[int, int] | None) -> tuple[Shape, Shape] | None:
    """The scales as a grid, and the rows and columns that each is of; None if they do not fit the weight.

    Args:
        weight: [rows, columns].
        block: rows and columns with one scale each, the last ones of a weight may be fewer.
    """
    rows, columns = weight
    if scale in ((), (1,), (1, 1)):
        return (1, 1), (rows, columns)
    if block and scale == (-(-rows // block[0]), -(-columns // block[1])):
        return scale, block
    if scale in ((rows,), (rows, 1)):
        return (rows, 1), (1, columns)
    return None


def decode_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The weight in float32.

    Args:
        weight: [rows, columns], float8_e4m3fn.
        scale: of a shape that `scale_grid` accepts; as bytes, the exponents of powers of two.
    """
    fits = scale_grid(tuple(weight.shape), tuple(scale.shape), block)
    assert fits, (weight.shape, scale.shape, block)
    grid, (block_rows, block_columns) = fits
    factors = torch.exp2(scale.float() - _BIAS) if scale.dtype == torch.uint8 else scale.float()
    factors = factors.reshape(grid)[:, torch.arange(weight.shape[1]) // block_columns]
    out = torch.empty(weight.shape, dtype=torch.float32)
    for start in range(0, len(weight), _ROWS_AT_A_TIME):
        rows = torch.arange(start, min(start + _ROWS_AT_A_TIME, len(weight)))
        torch.mul(weight[rows].float(), factors[rows // block_rows], out=out[start : start + len(rows)])
    return out


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weight [..., columns, rows] in bfloat16, which holds every value of the format.

    Args:
        blocks: [..., rows, groups, 16], uint8: the first of two values is in the low half of a byte.
        scales: [..., rows, groups], uint8: exponents.
    """
    values = torch.tensor(_E2M1, dtype=torch.bfloat16)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)  # of each byte
    out = torch.empty(*scales.shape, MXFP4_GROUP, dtype=torch.bfloat16)
    torch.ldexp(pairs[blocks.int()].flatten(-2), scales.int()[..., None] - _BIAS, out=out)
    return out.flatten(-2).transpose(-1, -2)
