"""The product of linear layers is torch's, whichever library computes it."""

import pytest
import torch
import torch.nn.functional as F

from megatron_star.speed import linear as linear_module
from megatron_star.speed.linear import MANY_ROWS, Linear, linear_by_onednn

LAYOUTS = {
    "by rows": lambda weight: weight,
    "by columns": lambda weight: weight.t().contiguous().t(),
    "some rows": lambda weight: torch.cat((weight, weight))[3 : 3 + len(weight)].copy_(weight),
    "some columns": lambda weight: torch.cat((weight, weight), dim=1)[:, : weight.size(1)],
    "some rows of weights by columns": lambda weight: (
        torch.cat((weight, weight)).t().contiguous().t()[: len(weight)]
    ),
}
WITH_GAPS = {"some columns", "some rows of weights by columns"}


ALL_LINEAR = [Linear(few, many) for few in (False, True) for many in (False, True)]


@pytest.fixture(params=ALL_LINEAR, ids=lambda one: f"few {one.few_by_onednn}, many {one.many_by_onednn}")
def linear(request) -> Linear:
    """Whatever was measured."""
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 37])
def test_it_equals_torchs(linear, dtype, layout, has_bias, rows):
    generator = torch.Generator().manual_seed(rows)
    weight = LAYOUTS[layout](torch.randn(40, 24, generator=generator).to(dtype))
    bias = torch.randn(40, generator=generator).to(dtype) if has_bias else None
    inputs = torch.randn(rows, 1, 24, generator=generator).to(dtype)
    torch.testing.assert_close(linear(inputs, weight, bias), F.linear(inputs, weight, bias))


def test_an_input_may_have_gaps_in_memory(linear):
    inputs, weight = torch.randn(9, 1, 48)[..., :24], torch.randn(40, 24)
    torch.testing.assert_close(linear(inputs, weight), F.linear(inputs, weight))


def test_it_works_in_a_torch_without_onednn(linear, monkeypatch):
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", None)
    inputs, weight = torch.randn(9, 1, 24), torch.randn(40, 24)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))
    assert torch.equal(linear_by_onednn(inputs[:, 0], weight), F.linear(inputs[:, 0], weight))


@pytest.mark.parametrize("rows", [1, 2, MANY_ROWS - 1, MANY_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onednn_gets_float32_rows_and_weights_without_gaps(linear, rows, dtype, layout, monkeypatch):
    """With gaps it would fall back to an implementation that takes 100 times as long."""
    taken = []
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", lambda *arguments: taken.append(arguments))
    linear(torch.randn(rows, 24, dtype=dtype), LAYOUTS[layout](torch.randn(40, 24, dtype=dtype)))
    is_faster = linear.many_by_onednn if rows >= MANY_ROWS else linear.few_by_onednn
    may_take_it = rows > 1 and dtype == torch.float32 and layout not in WITH_GAPS
    assert len(taken) == (is_faster and may_take_it)
