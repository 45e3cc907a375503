"""Rows sorted by the experts that they chose, and the sum of what these make of them."""

import pytest
import torch
from torch import Tensor

from megatron_star.model.expert_layer import rows_by_expert, sum_by_row, sum_in_order


def _chosen(num_rows: int, num_experts: int, topk: int) -> Tensor:
    """[rows, experts], with `topk` of twice as many experts, of which these are the first half."""
    scores = torch.rand(num_rows, 2 * num_experts, generator=torch.Generator().manual_seed(num_rows))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(topk).indices, True)
    return chosen[:, :num_experts]


SIZES = [(37, 6, 3), (5, 2, 4), (1, 8, 1)]
"""Rows, experts, and how many of twice as many experts a row chooses."""


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "topk", "is_size_known"),
    [*((*sizes, is_known) for sizes in SIZES for is_known in (True, False)), (0, 6, 3, True)],
)
def test_the_sum_of_a_row_is_over_the_experts_that_it_chose(num_rows, num_experts, topk, is_size_known):
    """Where the number of rows is not known on the host, what comes out for those of no expert is ignored."""
    chosen, most = _chosen(num_rows, num_experts, topk), min(topk, num_experts)
    values = torch.randn(num_rows, num_experts, 7)
    expert, row = rows_by_expert(chosen, None if is_size_known else most * num_rows)
    count = int(chosen.sum())
    assert expert[:count].tolist() == sorted(expert[:count].tolist())
    assert (expert[count:] == -1).all() and len(expert) == (count if is_size_known else most * num_rows)
    outs = values[row, expert]
    outs[count:] = torch.nan
    expected = (values * chosen.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(sum_by_row(outs, expert, row, chosen, most), expected)
    if is_size_known:
        torch.testing.assert_close(sum_in_order(outs, row, num_rows), expected)


def test_the_sum_is_rounded_once():
    chosen = torch.ones(1, 3, dtype=torch.bool)
    expert, row = rows_by_expert(chosen, None)
    outs = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    expected = 1.0 + 2.0**-7  # in bfloat16 it would be 1
    assert sum_by_row(outs, expert, row, chosen, 3).item() == sum_in_order(outs, row, 1).item() == expected
