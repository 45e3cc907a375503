"""How many ranks experts are spread over: from the command line to groups, and what cannot be is refused."""

import re
from typing import Any

import pytest
import torch
from test_model import ARGS

from megatron_star.job.argument_types import ArgumentParser
from megatron_star.job.asked import of_ranks
from megatron_star.job.grid import Grid
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.model.architecture import ModelParallelSizes, transformer_config

EXPERTS = {"num_experts": 60, "moe_router_topk": 2, "moe_ffn_hidden_size": 768}
TP_AND_CP = {"tensor_model_parallel_size": 2, "context_parallel_size": 4}


def parsed(*experts: object):
    """The arguments of a job of TP 2 x CP 4."""
    parser = ArgumentParser()
    add_model_arguments(parser)
    grid = ["--load", "x", "--tensor-model-parallel-size", 2, "--context-parallel-size", 4]
    return parser.parse_args(list(map(str, [*grid, *experts])))


@pytest.mark.parametrize(
    ("experts", "sizes"),
    [
        ([], (1, None)),
        (["--expert-model-parallel-size", 4], (4, None)),
        (["--expert-model-parallel-size", 4, "--expert-tensor-parallel-size", 2], (4, 2)),
    ],
)
def test_sizes_that_are_asked_for_are_the_grids_and_can_be_grouped(experts, sizes):
    grid = Grid.of_arguments(parsed(*experts))
    assert grid == Grid(tp_size=2, cp_size=4, ep_size=sizes[0], expert_tp_size=sizes[1])
    grid.check(8)


@pytest.mark.parametrize(
    ("ranks", "sizes", "message"),
    [
        (6, {}, "tensor-parallel size 2 x context-parallel size 4 needs 8 ranks, but 6 were started"),
        (8, {"ep_size": 3}, "expert-parallel size 3 x expert-tensor-parallel size 1 must divide the 8 ranks"),
        (
            8,
            {"ep_size": 16},
            "expert-parallel size 16 x expert-tensor-parallel size 1 must divide the 8 ranks",
        ),
        (
            8,
            {"ep_size": 8, "expert_tp_size": 2},
            "expert-parallel size 8 x expert-tensor-parallel size 2 must divide the 8 ranks",
        ),
        (
            8,
            {"expert_tp_size": 3},
            "expert-parallel size 1 x expert-tensor-parallel size 3 must divide the 8",
        ),
    ],
)
def test_ranks_that_cannot_be_grouped_so_are_refused(ranks, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Grid(tp_size=2, cp_size=4, **sizes).check(ranks)


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (EXPERTS, {"ep": 8}, "num_experts 60 cannot be divided over expert-parallel size 8"),
        (
            EXPERTS,
            {"expert_tp": 5},
            "moe_ffn_hidden_size 768 cannot be divided over expert-tensor-parallel size 5",
        ),
        ({}, {"ep": 2}, "expert-parallel size 2: the model has no experts"),
    ],
)
def test_a_model_whose_experts_cannot_be_spread_so_is_refused(
    model: dict[str, Any], sizes: dict[str, int], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        transformer_config(
            ARGS | model, ModelParallelSizes(**sizes), dtype=torch.float32, device=torch.device("cpu")
        )


@pytest.mark.parametrize("flag", ["--expert-model-parallel-size", "--expert-tensor-parallel-size"])
@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5"])
def test_a_size_that_is_no_positive_number_is_refused(flag, value):
    with pytest.raises(ValueError, match=re.escape(flag)):
        parsed(f"{flag}={value}")


def test_times_of_other_groups_of_experts_are_not_compared_and_answers_from_before_there_were_any_are():
    assert of_ranks(parsed()) == TP_AND_CP
    assert of_ranks(parsed("--expert-model-parallel-size", 2)) == TP_AND_CP | {
        "expert_model_parallel_size": 2
    }
    assert of_ranks(parsed("--expert-tensor-parallel-size", 1)) == TP_AND_CP | {
        "expert_tensor_parallel_size": 1
    }
