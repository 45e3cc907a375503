"""The contract test of all attention kernels, run on stubs here and on a GPU by `tests/gpu`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import reference
import torch
from torch import Tensor

from megatron_star.attention.partial import AttentionKernel, Partial

SHAPES = [(1, 1), (6, 1), (1, 37), (37, 37), (5, 129), (65, 3), (100, 41), (70, 70)]
"""Query rows and keys: fewer, as many, more; one key; odd sizes; below and above the limit of folded rows."""
BANDS: list[tuple[int, int, int | None]] = [
    (37, 37, 1),
    (37, 37, 5),
    (37, 70, None),
    (5, 37, 3),
    (1, 37, 8),
    (70, 101, 37),
    (70, 101, 400),
    (36, 37, 36),
    (131, 140, 9),
]
"""Causal: query rows, keys and window; of one key, of more than there are, smaller and larger than the keys
before the first row."""
HEADS = [(9, 3), (4, 4), (8, 1)]
EMPTY = [(0, 5), (5, 0), (0, 0)]
SOFTCAP = 1.5
"""Lower than some of the scores of `tensors` at the scale of the checks."""
TOLERANCE = {torch.float32: 5e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def tensors(
    sq: int,
    sk: int,
    *,
    np: int = 9,
    ng: int = 3,
    hn: int = 16,
    hv: int | None = None,
    b: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """Random query, key and value, each between rows of NaN that nobody may read; values of hv, if given."""
    generator = torch.Generator().manual_seed(sq * 1000 + sk)
    shapes = [(sq, b, np, hn), (sk, b, ng, hn), (sk, b, ng, hv or hn)]
    return [
        _between_nan(torch.randn(shape, generator=generator).to(dtype=dtype, device=device))
        for shape in shapes
    ]


def _between_nan(tensor: Tensor) -> Tensor:
    larger = tensor.new_full((tensor.size(0) + 5, *tensor.shape[1:]), torch.nan)
    larger[2:-3] = tensor
    return larger[2:-3]


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """What torch allocates holds NaN until it is written: a kernel that leaves rows out is found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_equals_reference(
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tolerance: float,
    softcap: float | None = None,
) -> None:
    """The kernel equals attention in float64: without a mask, and causal where it is square.

    Args:
        softcap: that the kernel was chosen with.
    """
    for causal in [False, True] if query.size(0) == key.size(0) else [False]:
        with nan_in_fresh_memory():
            part = kernel(query, key, value, causal=causal, softmax_scale=0.3)
        expected = reference.attention(query, key, value, causal=causal, softmax_scale=0.3, softcap=softcap)
        assert_same_partial(part, *expected, tolerance)


def check_band(
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    tolerance: float,
    softcap: float | None = None,
) -> None:
    """Likewise, causal with keys before the first row's, and with a window."""
    with nan_in_fresh_memory():
        part = kernel(query, key, value, causal=True, softmax_scale=0.3, window=window)
    expected = reference.attention(
        query, key, value, causal=True, softmax_scale=0.3, window=window, softcap=softcap
    )
    assert_same_partial(part, *expected, tolerance)


def check_empty(kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Without a row or without a key: zero and minus infinity, in the shapes of the contract."""
    sq, b, np, hn = query.shape
    for causal in [False, True] if query.size(0) == key.size(0) else [False]:
        with nan_in_fresh_memory():
            part = kernel(query, key, value, causal=causal, softmax_scale=1.0)
        assert part.out.shape == (b, np, sq, hn) and part.softmax_lse.shape == (b, np, sq)
        assert part.softmax_lse.dtype == torch.float32
        assert (part.out == 0).all() and (part.softmax_lse == -math.inf).all()


def check_strided(
    kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, *, tolerance: float
) -> None:
    """Heads that lie apart in memory, as those that Megatron cuts out of one projection do."""
    query, key, value = (
        torch.cat((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., : tensor.size(-1)]
        for tensor in (query, key, value)
    )
    assert not query.is_contiguous()
    check_equals_reference(kernel, query, key, value, tolerance=tolerance)


def assert_same_partial(actual: Partial, out: Tensor, lse: Tensor, tolerance: float) -> None:
    """Same shapes, LSE in float32, values within the tolerance."""
    assert actual.softmax_lse.dtype == torch.float32
    torch.testing.assert_close(actual.out.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual.softmax_lse.double(), lse, atol=tolerance, rtol=tolerance)
