"""Counting goes through every kernel, also where torch's own formulas would stop."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counted_work import FORMULAS
from megatron_star.attention.kernels import KERNELS


@pytest.mark.parametrize("name", ["torch-flash", "torch-cudnn", "torch-efficient"])
def test_grouped_heads_on_a_gpu_are_left_to_the_counting_kernel(name):
    """Tensors of a GPU that is not there; without our formulas, torch 2.11 asserts on two of these."""
    with FakeTensorMode():
        query, key = (torch.empty(5, 1, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (6, 2))
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            KERNELS[name].loaded().attend(query, key, key, False, 1.0)
    assert counter.get_total_flops() == 0
