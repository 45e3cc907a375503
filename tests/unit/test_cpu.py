"""What is done for machines without a GPU."""

import torch

from megatron_star.model.cpu import lay_out_by_columns


def test_weights_keep_their_values_and_shape_in_another_layout():
    weight = torch.nn.Parameter(torch.randn(7, 5), requires_grad=False)
    before = weight.detach().clone()
    lay_out_by_columns([weight])
    assert torch.equal(weight, before) and weight.stride() == (1, 7)


def test_slices_of_either_layout_are_views_that_a_product_takes():
    weight = torch.nn.Parameter(torch.randn(7, 5), requires_grad=False)
    row = torch.randn(1, 5)
    expected = torch.nn.functional.linear(row, weight[2:5].clone())
    lay_out_by_columns([weight])
    assert weight[2:5].untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    torch.testing.assert_close(torch.nn.functional.linear(row, weight[2:5]), expected)


def test_weights_with_fewer_columns_than_rows_stay_as_they_lie():
    wide = torch.nn.Parameter(torch.randn(5, 7), requires_grad=False)
    lay_out_by_columns([wide])
    assert wide.stride() == (7, 1)
