"""Experts of each kind with random weights, and rows for them: what tests on a CPU and on a GPU share."""

import torch
from expert_blocks import HIDDEN, NUM_EXPERTS, config_of_experts
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_star.model.grouped_experts import ROWS_AT_ONCE

KINDS = {
    "swiglu": {},
    "gpt-oss": {
        "add_bias_linear": True,
        "swiglu": False,
        "activation": "quick_gelu",
        "gated_mlp": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 0.7,
    },
    "without a gate": {"swiglu": False, "activation": "relu2", "add_bias_linear": True},
    "weights on the input": {
        "moe_apply_probs_on_input": True,
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
        "add_bias_linear": True,
    },
}
COUNTS = {
    "some without rows": [0, 3, 0, 0, 7, 1, 0, 2],
    "all": [5, 3, 1, 2, 4, 1, 6, 2],
    "one has all rows": [0, 0, 0, 19, 0, 0, 0, 0],
    "one row": [0, 0, 0, 0, 0, 0, 0, 1],
    "no rows": [0] * 8,
    "many rows": [0, ROWS_AT_ONCE - 3, 3, 1, 0, 2 * ROWS_AT_ONCE, 2, 0],
}


def experts_of(cls, groups, dtype=torch.float32, num_experts=NUM_EXPERTS, **args):
    """With random weights and biases, the same of both classes."""
    config = config_of_experts(dtype, **args)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = cls(num_experts, config, linears, pg_collection=groups).eval().requires_grad_(False)
    torch.manual_seed(4)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return experts


def inputs(counts, dtype=torch.float32):
    torch.manual_seed(5)
    rows = torch.randn(sum(counts), HIDDEN).to(dtype)
    return rows, torch.tensor(counts), torch.rand(sum(counts)) + 0.1
