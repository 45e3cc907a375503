"""Weights laid out in memory for reading."""

import pytest
import torch

from megatron_star.speed.layout import lay_out


@pytest.mark.parametrize(("by_columns", "stride"), [(True, (1, 7)), (False, (5, 1))])
def test_weights_keep_their_values_and_shape_in_another_layout(by_columns, stride):
    weight = torch.nn.Parameter(torch.randn(7, 5), requires_grad=False)
    before = weight.detach().clone()
    lay_out(weight, by_columns=not by_columns)
    lay_out(weight, by_columns=by_columns)
    assert torch.equal(weight, before) and weight.stride() == stride


@pytest.mark.parametrize("by_columns", [True, False])
def test_slices_of_either_layout_are_views_that_a_product_takes(by_columns):
    weight = torch.nn.Parameter(torch.randn(7, 5), requires_grad=False)
    row = torch.randn(1, 5)
    expected = torch.nn.functional.linear(row, weight[2:5].clone())
    lay_out(weight, by_columns=by_columns)
    assert weight[2:5].untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    torch.testing.assert_close(torch.nn.functional.linear(row, weight[2:5]), expected)
