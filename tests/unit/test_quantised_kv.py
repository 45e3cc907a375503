"""Keys and values in 8 bits: what is lost is bounded, and what reads them reads what is stored."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_star.attention import quantised_cpu
from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.kv_formats import DTYPES, kv_format
from megatron_star.attention.quantised_kv import QuantisedFormat, QuantisedKv, QuantisedTensor, rotation
from megatron_star.attention.running import RunningAttention
from megatron_star.config import KV_DTYPES

SCALE = 0.3
ERROR = {"int8": 0.5 / 127, "fp8": 2**-4}
"""Of the largest value of a rotated token, at most: half a step."""


def stored(num_tokens: int, form: QuantisedFormat, ng: int = 2, size: int = 32) -> QuantisedKv:
    """With keys and values of very different sizes."""
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = torch.rand(num_tokens, 1, ng, 1, generator=generator) * 10
    key, value = (torch.randn(num_tokens, 1, ng, size, generator=generator) * sizes for _ in range(2))
    kv = form.empty(num_tokens, (key, value))
    kv.write(0, key, value)
    return kv


def exact(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in float64: [1, np, sq, hv] and its LSE."""
    heads = query.size(2) // key.size(2)
    q, k, v = (each.double().permute(1, 2, 0, 3) for each in (query, key, value))
    k, v = (each.repeat_interleave(heads, 1) for each in (k, v))
    scores = SCALE * q @ k.transpose(2, 3)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("size", [1, 3, 64, 80, 96, 128, 256])
def test_the_rotation_is_orthogonal_symmetric_and_has_no_large_value(size):
    matrix = rotation(size, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.T)
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-6


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", [37, 64])
def test_an_outlier_in_one_channel_costs_the_others_little(name, size):
    """Without the rotation, int8's step would be a hundred times as large."""
    tensor = torch.randn(50, 1, 2, size)
    tensor[..., 3] = 400.0
    kept = QuantisedTensor.empty(50, tensor, DTYPES[name])
    kept.write(tensor)
    largest = (tensor.norm(dim=-1) * math.sqrt(2 / size)).max()
    assert (kept.read(torch.float32) - tensor).norm(dim=-1).max() <= ERROR[name] * largest * math.sqrt(size)


@pytest.mark.parametrize("name", DTYPES)
def test_zeros_stay_zeros_and_what_is_not_finite_does_not_become_finite(name):
    tensor = torch.zeros(4, 1, 1, 8)
    tensor[1, ..., 0], tensor[2, ..., 0], tensor[3] = torch.nan, torch.inf, 1e-44
    kept = QuantisedTensor.empty(4, tensor, DTYPES[name])
    kept.write(tensor)
    read = kept.read(torch.float32)
    assert torch.equal(read[0], tensor[0]) and read[3].abs().max() < 1e-43
    assert not read[1].isfinite().any() and not read[2].isfinite().any()


def formats() -> list[object]:
    """Those of a CPU: with the kernel that reads int8, if there is a compiler, and without."""
    cpu = torch.device("cpu")
    compiled = kv_format("int8", device=cpu, head_size=32)
    marks = () if compiled.attend else pytest.mark.skip(reason="no C++ compiler")
    return [
        pytest.param(compiled, id="compiled", marks=marks),
        pytest.param(kv_format("int8", device=cpu, head_size=32, softcap=30.0), id="widened"),
        pytest.param(kv_format("fp8", device=cpu, head_size=32), id="fp8"),
    ]


@pytest.mark.parametrize("form", formats())
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize(("num_rows", "np"), [(1, 2), (1, 6), (3, 6), (21, 6), (22, 6)])
def test_attention_to_what_is_stored_is_attention_to_what_is_read_back(form, num_tokens, num_rows, np):
    kv = stored(num_tokens + 3, form)
    query = torch.randn(num_rows + 2, 1, np, 32)
    kernel = select_kernel("auto", device=query.device, dtype=query.dtype, head_size=32)
    attention = RunningAttention(kernel, SCALE, query)
    kv.held(num_tokens).add_to(attention, [(1, num_rows + 1)])
    out, lse = attention.merged()
    expected, expected_lse = exact(query[1:-1], *kv.read(slice(num_tokens)))
    largest = kv.read(slice(num_tokens))[1].abs().max()
    torch.testing.assert_close(out[:, :, 1:-1].double(), expected, atol=1e-5 * largest.item(), rtol=0)
    torch.testing.assert_close(lse[:, :, 1:-1].double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert not out[:, :, [0, -1]].any() and lse[:, :, [0, -1]].isneginf().all()


@pytest.mark.parametrize("form", formats())
def test_a_key_that_is_not_a_number_reaches_the_result(form):
    kv = stored(300, form)
    kv.key.scales[200] = torch.nan
    query = torch.randn(1, 1, 4, 32)
    kernel = select_kernel("auto", device=query.device, dtype=query.dtype, head_size=32)
    attention = RunningAttention(kernel, SCALE, query)
    kv.held(300).add_to(attention, [(0, 1)])
    assert attention.merged().out.isnan().all()


def test_what_is_written_is_read_exactly_until_it_is_forgotten():
    form = kv_format("int8", device=torch.device("cpu"), head_size=32, softcap=1.0)
    key, value = torch.randn(40, 1, 2, 32), torch.randn(40, 1, 2, 32)
    kv = form.empty(40, (key, value))
    kv.write(0, key[:10], value[:10])
    for start, end in ((10, 18), (18, 30)):
        kv.write(start, key[start:end], value[start:end])
        kv.keep_exact(start, key[start:end], value[start:end])
    heads = torch.tensor([[9, 29], [10, 17], [18, 0], [25, 3]])
    rounded = QuantisedKv(40, (key, value), form)
    rounded.write(0, key, value)
    read, read_of_heads = kv.read(slice(5, 30)), kv.read_of_heads(heads)
    for tensor, once, found, of_heads in zip(
        (key, value), rounded.read(slice(40)), read, read_of_heads, strict=True
    ):
        assert torch.equal(found, torch.cat((once[5:10], tensor[10:30])))
        mixed = torch.cat((once[:10], tensor[10:30]))
        expected = mixed.gather(0, heads[:, None, :, None].expand(-1, 1, -1, 32))
        torch.testing.assert_close(of_heads, expected, atol=1e-6, rtol=0)
        assert not torch.equal(once[10:30], tensor[10:30])
    assert kv.read(slice(12, 16))[0].data_ptr() == key[12:].data_ptr(), "a copy where a view would do"
    kv.forget_exact()
    assert torch.equal(kv.read(slice(5, 30))[0], rounded.read(slice(5, 30))[0])


def test_what_cannot_be_stored_so_is_refused_by_name():
    choose = partial(kv_format, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"'int4': it must be one of {', '.join(KV_DTYPES)}"):
        choose("int4", head_size=64)
    with pytest.raises(ValueError, match="kv-dtype is 'int8'.*latent attention"):
        choose("int8", head_size=None)
    assert choose("auto", head_size=None).name == "auto"


def test_without_a_compiler_or_for_odd_heads_there_is_no_kernel(monkeypatch):
    choose = partial(kv_format, "int8", device=torch.device("cpu"))
    assert choose(head_size=40).attend is None and choose(head_size=512).attend is None
    monkeypatch.setattr(quantised_cpu, "COMPILER", "no-such-compiler")
    assert choose(head_size=64).attend is None
    monkeypatch.setattr(quantised_cpu, "COMPILER", "false")
    assert choose(head_size=64).attend is None
