"""The merge of any split of the keys is one softmax over all of them."""

import math

import pytest
import reference
import torch
from kernel_contract import assert_same_partial, tensors

from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.merge import PartialSum, merge_outs, merge_parts, with_sinks
from megatron_star.attention.partial import Partial, empty_partial


def attend(query, key, value):
    """The CPU's kernel, every row seeing every key."""
    kernel = select_kernel("torch-cpu", device=query.device, dtype=query.dtype, head_size=query.size(3))
    return kernel(query, key, value, causal=False, softmax_scale=1.0)


SPLITS = [[10, 27], [0, 37], [37, 0], [0, 0, 37], [1, 1, 35], [12, 0, 12, 13]]


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0, 3000.0])
def test_merging_any_split_of_the_keys_is_one_softmax(sizes, shift):
    """`shift` moves the scores of the last part, so that LSEs differ by that much."""
    q, k, v = (tensor.double() for tensor in tensors(7, 37, np=3))
    k[-sizes[-1] :] += shift * q.mean(0, keepdim=True) / q.mean(0).pow(2).sum(-1, keepdim=True)
    expected = reference.attention(q, k, v, softmax_scale=1.0)
    parts = [
        Partial(out.float(), lse.float())
        for out, lse in (
            reference.attention(q, key, value, softmax_scale=1.0)
            for key, value in zip(k.split(sizes), v.split(sizes), strict=True)
        )
    ]

    lses = torch.stack([part.softmax_lse for part in parts])
    stacked = merge_parts(torch.stack([part.out for part in parts]), lses)
    running = PartialSum(q.float())
    for part in parts:
        running.add_rows(0, 7, part)

    assert_same_partial(stacked, *expected, 1e-4)
    assert_same_partial(running.merged(), *expected, 1e-4)


@pytest.mark.parametrize("gap", [-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4])
def test_a_merge_is_exact_at_any_gap_of_the_lse(gap):
    outs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    lses = torch.tensor([5.0, 5.0 + gap]).view(2, 1, 1, 1)
    weight = 1 / (1 + math.exp(-gap)) if abs(gap) < 700 else float(gap > 0)
    expected_lse = 5 + max(gap, 0) + math.log1p(math.exp(-abs(gap)))
    running = PartialSum(torch.zeros(1, 1, 1, 1))
    for out, lse in zip(outs, lses, strict=True):
        running.add_rows(0, 1, Partial(out.clone(), lse.clone()))
    for out in (merge_outs(outs, lses), running.merged().out):
        assert out.item() == pytest.approx(1 + 2 * weight, rel=1e-6)
    assert running.merged().softmax_lse.item() == pytest.approx(expected_lse, rel=1e-6)


def test_merging_parts_without_any_key_gives_zero_and_minus_infinity():
    query = torch.zeros(5, 1, 2, 4)
    empty = empty_partial(query)
    running = PartialSum(query)
    running.add_rows(0, 5, empty)
    running.add_rows(0, 5, empty)
    stacked = merge_outs(empty.out.expand(3, -1, -1, -1, -1), empty.softmax_lse.expand(3, -1, -1, -1))
    assert (running.merged().out == 0).all() and (stacked == 0).all()
    assert (running.merged().softmax_lse == -math.inf).all()


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
def test_a_sink_is_one_more_key_whose_value_is_zero(shift):
    """With sinks, attention is what it is over keys whose first has the sink's score and no value."""
    query, key, value = (tensor.double() for tensor in tensors(7, 37, np=3))
    sinks = torch.randn(3, generator=torch.Generator().manual_seed(1)) + shift
    expected, _ = reference.attention(
        query, key, value, causal=True, softmax_scale=1.0, window=5, sinks=sinks
    )
    out, lse = reference.attention(query, key, value, causal=True, softmax_scale=1.0, window=5)
    actual = with_sinks(out.float(), lse.float(), sinks)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    # The key that a sink is: one head, of queries of one entry more, in which only this key is not 0.
    with_one = torch.nn.functional.pad(query[:, :, :1], (0, 1), value=1.0)
    with_sink = torch.nn.functional.pad(key[:, :, :1], (0, 1, 0, 0, 0, 0, 1, 0))
    with_sink[0, 0, 0, -1] = sinks[0]
    of_head, _ = reference.attention(
        query[:, :, :1], key[:, :, :1], value[:, :, :1], softmax_scale=1.0, sinks=sinks[:1]
    )
    padded, _ = reference.attention(
        with_one,
        with_sink,
        torch.nn.functional.pad(value[:, :, :1], (0, 0, 0, 0, 0, 0, 1, 0)),
        softmax_scale=1.0,
    )
    torch.testing.assert_close(of_head, padded, atol=1e-9, rtol=1e-9)


def test_a_sink_of_a_row_without_keys_gives_zero():
    out, lse = empty_partial(torch.zeros(5, 1, 2, 4))
    assert (with_sinks(out, lse, torch.tensor([0.0, -50.0])) == 0).all()


def test_a_part_that_is_not_a_number_is_not_lost_in_the_merge():
    outs, lses = torch.ones(2, 1, 1, 1, 1), torch.tensor([5.0, math.nan]).view(2, 1, 1, 1)
    assert merge_outs(outs, lses).isnan().all()


def test_many_bf16_parts_are_accumulated_in_float32():
    q, k, v = tensors(3, 512, np=3, dtype=torch.bfloat16)
    expected, _ = reference.attention(q, k, v, softmax_scale=1.0)
    running = PartialSum(q)
    for key, value in zip(k.split(2), v.split(2), strict=True):
        out, lse = reference.attention(q, key, value, softmax_scale=1.0)
        running.add_rows(0, 3, Partial(out.float(), lse.float()))
    error = (running.merged().out - expected).abs().max().item()
    assert error < 1e-5
    assert running.result().dtype == torch.bfloat16


def test_rows_are_merged_where_they_belong():
    q, k, v = tensors(10, 20, np=3)
    running = PartialSum(q)
    for start, end in [(0, 4), (4, 10)]:
        running.set_rows(
            start,
            end,
            select_kernel("auto", device=torch.device("cpu"), dtype=torch.float32, head_size=16)(
                q[start:end], k[:5], v[:5], causal=False, softmax_scale=1.0
            ),
        )
    running.add_rows(
        2,
        7,
        select_kernel("auto", device=torch.device("cpu"), dtype=torch.float32, head_size=16)(
            q[2:7], k[5:], v[5:], causal=False, softmax_scale=1.0
        ),
    )
    all_keys, _ = reference.attention(q[2:7], k, v, softmax_scale=1.0)
    few_keys, _ = reference.attention(q, k[:5], v[:5], softmax_scale=1.0)
    result = running.result().permute(1, 2, 0, 3).double()
    torch.testing.assert_close(result[:, :, 2:7], all_keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result[:, :, [0, 1, 7, 9]], few_keys[:, :, [0, 1, 7, 9]], atol=1e-5, rtol=1e-5)
