"""The kernels over addresses equal attention in float64. In bfloat16 only a GPU runs them."""

import pytest
import torch
from tail_kernels import SHAPES, check

pytest.importorskip("triton", reason="Triton is in torch's CUDA builds and in the extra `dev`")
triton_tails = pytest.importorskip("megatron_star.attention.triton_tails")


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_rows_are_put_into_their_tails_and_attend_to_what_they_see(dtype, tolerance, shape, starts):
    check(triton_tails, shape, torch.zeros(0, dtype=dtype), tolerance, starts=starts)


@pytest.mark.parametrize(
    ("most_keys", "num_programs", "num_splits"),
    [
        (0, 1, 1),
        (512, 8, 1),
        (513, 8, 2),
        (5_000, 8, 16),
        (1 << 20, 8, 16),
        (5_000, 64, 8),
        (5_000, 9_999, 1),
    ],
)
def test_long_tails_are_shared_by_programs_while_there_are_few(most_keys, num_programs, num_splits):
    assert triton_tails.num_splits_for(most_keys, num_programs) == num_splits
