"""The product of linear layers is torch's, whichever library computes it."""

import pytest
import torch
import torch.nn.functional as F

from megatron_star.speed import linear as linear_module
from megatron_star.speed.linear import linear

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


@pytest.fixture(params=[True, False], ids=["where oneDNN is faster", "where MKL is faster"])
def onednn_is_faster(request, monkeypatch) -> bool:
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 37])
def test_it_equals_torchs(onednn_is_faster, dtype, layout, has_bias, rows):
    generator = torch.Generator().manual_seed(rows)
    weight = LAYOUTS[layout](torch.randn(40, 24, generator=generator).to(dtype))
    bias = torch.randn(40, generator=generator).to(dtype) if has_bias else None
    inputs = torch.randn(rows, 1, 24, generator=generator).to(dtype)
    torch.testing.assert_close(linear(inputs, weight, bias), F.linear(inputs, weight, bias))


def test_an_input_may_have_gaps_in_memory(onednn_is_faster):
    inputs, weight = torch.randn(9, 1, 48)[..., :24], torch.randn(40, 24)
    torch.testing.assert_close(linear(inputs, weight), F.linear(inputs, weight))


def test_it_works_in_a_torch_without_onednn(onednn_is_faster, monkeypatch):
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", None)
    inputs, weight = torch.randn(9, 1, 24), torch.randn(40, 24)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onednn_gets_many_float32_rows_and_weights_without_gaps(
    onednn_is_faster, rows, dtype, layout, monkeypatch
):
    """With gaps it would fall back to an implementation that takes 100 times as long."""
    taken = []
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", lambda *arguments: taken.append(arguments))
    linear(torch.randn(rows, 24, dtype=dtype), LAYOUTS[layout](torch.randn(40, 24, dtype=dtype)))
    may_take_it = rows == 2 and dtype == torch.float32 and layout not in WITH_GAPS
    assert len(taken) == (onednn_is_faster and may_take_it)
