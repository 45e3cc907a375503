"""Every way of attention on a CPU gives what torch's fused kernel does, whichever is taken here."""

import os
import shutil
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import kernel_contract as contract
import pytest
import torch
from kernel_contract import TOLERANCE, tensors

from megatron_star.attention.kernels import KERNELS
from megatron_star.speed.cpu_attention import KEYS, CpuAttention, ways
from megatron_star.speed.measured import CLEARLY_FASTER, LEAST_SAVED_SECONDS, agreed, fastest, least_seconds
from megatron_star.speed.native_attention import compile_few_rows_attention

NEEDS_COMPILER = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
WAYS = ["fused", "products", "as stored", pytest.param("native", marks=NEEDS_COMPILER)]


def taking(name, dtype, hn):
    """torch's kernel for a CPU, which takes this way for up to 64 rows; and a spy on the way."""
    native = compile_few_rows_attention(hn, dtype) if name == "native" else None
    candidates = ways(dtype, native)
    if name not in candidates:
        pytest.skip(f"{name} is not for {dtype}")
    way = Mock(wraps=candidates[name])
    attend = CpuAttention(hn, dtype, {edge: {64: way} for edge in KEYS})
    return replace(KERNELS["torch-cpu"].loaded(), attend=attend), way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("np", "ng", "hn"), [(9, 3, 16), (4, 1, 64), (10, 2, 80)])
@pytest.mark.parametrize(("sq", "sk"), [(1, 512), (1, 4100), (5, 1301), (16, 2048)])
def test_a_way_equals_the_reference(name, dtype, np, ng, hn, sq, sk):
    kernel, way = taking(name, dtype, hn)
    contract.check_equals_reference(
        kernel, *tensors(sq, sk, np=np, ng=ng, hn=hn, b=2, dtype=dtype), tolerance=TOLERANCE[dtype]
    )
    assert way.call_count == (sq * np // ng <= 64)


@pytest.mark.parametrize("name", WAYS)
def test_a_way_takes_large_scores(name):
    """All but one weight of a row may be 0."""
    kernel, _ = taking(name, torch.float32, 64)
    query, key, value = tensors(1, 1100, hn=64)
    contract.check_equals_reference(kernel, query * 100, key, value, tolerance=1e-3)


@NEEDS_COMPILER
def test_the_native_way_does_not_depend_on_the_number_of_threads():
    way = compile_few_rows_attention(64, torch.float32)
    query, key, value = tensors(7, 5000, np=3, hn=64)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(way(query, key, value, 0.3))
    torch.set_num_threads(before)
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("tensor", ["key", "value"])
def test_no_way_hides_what_is_not_a_number(name, tensor):
    kernel, _ = taking(name, torch.float32, 16)
    given = dict(zip(("query", "key", "value"), tensors(2, 700, hn=16), strict=True))
    given[tensor][123, 0, 1, 5] = torch.nan
    out = kernel(**given, causal=False, softmax_scale=0.3).out
    heads = out.unflatten(1, (3, 3))
    assert heads[:, 1, ..., 5].isnan().all() and not heads[:, [0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("dtype", "hn", "np", "sk", "options"),
    [
        (torch.bfloat16, 16, 9, 600, {}),
        (torch.float32, 32, 9, 600, {}),
        (torch.float32, 16, 9, 511, {}),
        (torch.float32, 16, 195, 600, {}),
        (torch.float32, 16, 9, 600, {"causal": True}),
    ],
    ids=["another dtype", "another head size", "few keys", "many rows", "causal"],
)
def test_what_was_not_measured_goes_to_torchs_kernel(dtype, hn, np, sk, options):
    kernel, way = taking("products", torch.float32, 16)
    sq = sk if options else 1
    kernel(*tensors(sq, sk, np=np, hn=hn, dtype=dtype), **{"causal": False, "softmax_scale": 0.3} | options)
    assert not way.called


def test_as_many_rows_and_keys_choose_as_was_measured():
    marks = {
        (edge, rows): Mock(side_effect=ways(torch.float32, None)["fused"]) for edge in KEYS for rows in (3, 6)
    }
    chosen = {edge: {rows: marks[edge, rows] for rows in (3, 6)} for edge in KEYS}
    attend = CpuAttention(16, torch.float32, chosen)
    first, second = KEYS
    for sq, sk in ((1, first), (3, first), (4, second - 1), (6, second), (2, 2 * second), (7, second)):
        query, key, value = tensors(sq, sk, np=1, ng=1)
        attend(query, key, value, False, 0.3)
    called = {place: mark.call_count for place, mark in marks.items()}
    assert called == {(first, 3): 2, (first, 6): 1, (second, 3): 1, (second, 6): 1}


def test_a_native_way_is_only_for_heads_that_fill_its_vectors():
    assert compile_few_rows_attention(20, torch.float32) is None
    assert compile_few_rows_attention(64, torch.float16) is None


def test_the_first_candidate_stays_unless_another_is_clearly_faster():
    assert fastest({"first": 1.0, "second": CLEARLY_FASTER + 0.01, "third": 2.0}) == "first"
    assert fastest({"first": 1.0, "second": CLEARLY_FASTER - 0.01, "third": CLEARLY_FASTER - 0.02}) == "third"
    few = LEAST_SAVED_SECONDS
    assert fastest({"first": 1.2 * few, "second": 0.3 * few}) == "first"
    assert fastest({"first": 1.4 * few, "second": 0.3 * few}) == "second"


def test_candidates_are_run_in_turn():
    order = []
    seconds = least_seconds({name: lambda name=name: order.append(name) for name in "ab"})
    assert list(seconds) == ["a", "b"] and order == ["a", "b"] * (len(order) // 2)


def test_all_ranks_take_the_times_of_the_slowest():
    others = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    exchanges = [Mock(slowest=partial(_longer, other)) for other in others]
    assert agreed({"a": 2.0, "b": 1.0}, exchanges) == {"a": 3.0, "b": 2.0}


def _longer(one, other):
    return torch.maximum(one, other).tolist()
