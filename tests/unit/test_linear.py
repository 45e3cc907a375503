"""The product of linear layers is torch's, whichever library computes it."""

import pytest
import torch
import torch.nn.functional as F

from megatron_star import linear as linear_module
from megatron_star.linear import linear

WEIGHTS = {
    "by rows": lambda weight: weight,
    "by columns": lambda weight: weight.t().contiguous().t(),
    "some rows": lambda weight: torch.cat((weight, weight))[3 : 3 + len(weight)].copy_(weight),
    "some columns": lambda weight: torch.cat((weight, weight), dim=1)[:, : weight.size(1)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 37])
def test_it_equals_torchs(dtype, layout, has_bias, rows):
    generator = torch.Generator().manual_seed(rows)
    weight = WEIGHTS[layout](torch.randn(40, 24, generator=generator).to(dtype))
    bias = torch.randn(40, generator=generator).to(dtype) if has_bias else None
    inputs = torch.randn(rows, 1, 24, generator=generator).to(dtype)
    torch.testing.assert_close(linear(inputs, weight, bias), F.linear(inputs, weight, bias))


def test_an_input_may_have_gaps_in_memory():
    inputs, weight = torch.randn(9, 1, 48)[..., :24], torch.randn(40, 24)
    torch.testing.assert_close(linear(inputs, weight), F.linear(inputs, weight))


def test_it_works_in_a_torch_without_onednn(monkeypatch):
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", None)
    inputs, weight = torch.randn(9, 1, 24), torch.randn(40, 24)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))


def test_many_float32_rows_take_onednn(monkeypatch):
    taken = []
    monkeypatch.setattr(linear_module, "_ONEDNN_LINEAR", lambda inputs, *_: taken.append(len(inputs)))
    for rows, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.bfloat16)):
        linear(torch.randn(rows, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype))
    assert taken == [2]
