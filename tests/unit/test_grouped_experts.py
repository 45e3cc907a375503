"""Experts computed together are Megatron's experts, computed one after the other."""

import pytest
import torch
from expert_blocks import HIDDEN, one_rank
from megatron.core.transformer.moe.experts import SequentialMLP
from some_experts import COUNTS, KINDS, experts_of, inputs

from megatron_star.model.grouped_experts import StackedExperts


@pytest.fixture(scope="module", autouse=True)
def groups():
    with one_rank() as groups:
        yield groups


@pytest.fixture(params=["separate", "grouped"])
def path(request, monkeypatch):
    """A GPU's product runs on a CPU, too."""
    is_grouped = request.param == "grouped"
    monkeypatch.setattr(
        StackedExperts, "_takes_grouped_products", lambda self, rows: is_grouped and self._is_aligned()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_are_megatrons(kind, counts, dtype, groups, path):
    args = inputs(COUNTS[counts], dtype)
    expected, _ = experts_of(SequentialMLP, groups, dtype, **KINDS[kind])(*args)
    out, bias = experts_of(StackedExperts, groups, dtype, **KINDS[kind])(*args)
    assert bias is None and out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_one_expert_of_a_rank_is_megatrons(groups, path):
    args = inputs([7])
    expected, _ = experts_of(SequentialMLP, groups, num_experts=1, **KINDS["gpt-oss"])(*args)
    out, bias = experts_of(StackedExperts, groups, num_experts=1, **KINDS["gpt-oss"])(*args)
    assert bias is None
    torch.testing.assert_close(out, expected)


def test_rows_of_no_expert_change_nothing(groups, path):
    rows, counts, probs = inputs(COUNTS["some without rows"])
    experts = experts_of(StackedExperts, groups, **KINDS["gpt-oss"])
    expected, _ = experts(rows, counts, probs)
    nothing = torch.full((5, HIDDEN), float("nan"))
    out, _ = experts(torch.cat([rows, nothing]), counts, torch.cat([probs, torch.ones(5)]))
    assert experts.ignores_rows_of_no_expert and out.size(0) == rows.size(0) + 5
    torch.testing.assert_close(out[: rows.size(0)], expected)


def are_views(experts):
    """Whether the experts' weights lie one after the other, each kind in one tensor."""
    for name, stacked in experts.stacked.items():
        for parameter, view in zip(experts._parameters_named(name), stacked, strict=True):
            assert parameter.data_ptr() == view.data_ptr() and parameter.dtype == stacked.dtype, name
            assert torch.equal(parameter, view)
    return True


@pytest.mark.parametrize(
    "change",
    [
        torch.nn.Module.bfloat16,
        lambda experts: experts.to("cpu", torch.float64),
        torch.nn.Module.share_memory,
        lambda experts: experts.to("meta").to_empty(device="cpu"),
    ],
    ids=["bfloat16", "float64", "share_memory", "to_empty"],
)
def test_weights_stay_views_of_one_tensor(change, groups):
    experts = experts_of(StackedExperts, groups, **KINDS["gpt-oss"])
    assert are_views(experts)
    twin = experts_of(SequentialMLP, groups, **KINDS["gpt-oss"])
    changed = change(experts)
    dtype = next(changed.parameters()).dtype
    changed.load_state_dict(twin.state_dict())
    assert are_views(changed)
    rows, counts, probs = inputs(COUNTS["all"], dtype)
    expected, _ = twin.to(dtype)(rows, counts, probs)
    torch.testing.assert_close(changed(rows, counts, probs)[0], expected)


def test_weights_keep_megatrons_names_and_places(groups):
    metadata = {"dp_cp_group": groups.dp_cp}
    ours, megatrons = (
        experts_of(cls, groups, **KINDS["gpt-oss"]).sharded_state_dict("mlp.experts.", (), metadata)
        for cls in (StackedExperts, SequentialMLP)
    )
    assert {name: tensor.key for name, tensor in ours.items()} == {
        name: tensor.key for name, tensor in megatrons.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_products_ask_nothing_of_the_device(kind, groups, monkeypatch):
    """A meta tensor has no values: whatever waits for one fails."""
    monkeypatch.setattr(StackedExperts, "_takes_grouped_products", lambda *_: True)
    experts = experts_of(StackedExperts, groups, torch.bfloat16, **KINDS[kind]).to("meta")
    args = (tensor.to("meta") for tensor in inputs(COUNTS["all"], torch.bfloat16))
    out, _ = experts(*args)
    assert out.shape == (sum(COUNTS["all"]), HIDDEN) and out.dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "is_aligned"), [(24, True), (20, False)])
def test_rows_that_are_not_aligned_take_no_grouped_product(size, is_aligned, groups):
    experts = experts_of(StackedExperts, groups, torch.bfloat16, moe_ffn_hidden_size=size)
    assert experts._is_aligned() == is_aligned
    rows, counts, _ = inputs(COUNTS["all"], torch.bfloat16)
    hidden = torch.zeros(rows.size(0), size, dtype=torch.bfloat16)
    weight = experts.stacked["linear_fc2.weight"].transpose(1, 2)
    ends = counts.cumsum(0, dtype=torch.int32)
    if is_aligned:
        torch.nn.functional.grouped_mm(hidden, weight, offs=ends)
    else:
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            torch.nn.functional.grouped_mm(hidden, weight, offs=ends)
