"""The most distinct keys are those of least cosine similarity with the mean direction, head by head."""

import pytest
import torch
from reference import most_distinct_one_by_one

from megatron_star.attention.distinct_keys import most_distinct, of_heads


@pytest.mark.parametrize(("num_keys", "first"), [(5, 0), (1, 0), (37, 0), (0, 0), (7, 4), (33, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_distinct_keys_are_those_that_a_loop_over_heads_finds(num_keys, first, dtype):
    key = (torch.randn(37, 1, 3, 8, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)

    positions = most_distinct(key, num_keys, first)

    assert positions.tolist() == most_distinct_one_by_one(key, num_keys, first).tolist()


def test_a_long_key_is_no_more_distinct_than_a_short_one_of_its_direction():
    key = torch.randn(20, 1, 2, 4, generator=torch.Generator().manual_seed(2)) + 1.0
    longer = key * torch.linspace(0.1, 10, 20)[:, None, None, None]

    assert torch.equal(most_distinct(longer, 6), most_distinct(key, 6))


def test_each_head_gets_the_rows_at_its_own_positions():
    tensor = torch.arange(5 * 2 * 3).view(5, 1, 2, 3)

    taken = of_heads(tensor, torch.tensor([[4, 0], [1, 1]]))

    assert taken.tolist() == [[[[24, 25, 26], [3, 4, 5]]], [[[6, 7, 8], [9, 10, 11]]]]
