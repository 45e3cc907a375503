"""The Triton merge equals its torch twin, in Triton's interpreter, and compiles for every GPU it may meet."""

import importlib
import sys

import pytest
import torch
from torch import Tensor

from megatron_star.attention.merge import PartialSum, merge_into, merge_into_on
from megatron_star.attention.partial import Partial

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
MODULE = "megatron_star.attention.triton_merge"
GAPS = [-torch.inf, -1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4]


@pytest.fixture
def triton_merge(monkeypatch):
    """The module with its kernel run by the interpreter, which a decorator decides at import."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def parts(sq: int, hn: int, dtype: torch.dtype, b: int = 2, np: int = 3) -> tuple[Partial, Partial]:
    """A running sum as `PartialSum` lays it out, and a part; their LSEs differ by all of GAPS and more."""
    generator = torch.Generator().manual_seed(sq + hn)
    running = PartialSum(torch.zeros(sq + 4, b, np, hn))
    old = Partial(*(whole[:, :, 1 : sq + 1] for whole in running.merged()))
    old.out.copy_(torch.randn(b, np, sq, hn, generator=generator))
    old.softmax_lse.copy_(torch.randn(b, np, sq, generator=generator))
    old.softmax_lse[:, 0] = -torch.inf
    old.out[:, 0] = 0
    new = torch.randn(b, sq, np, hn, generator=generator).transpose(1, 2).to(dtype)
    lse = old.softmax_lse.nan_to_num(neginf=0.0) + torch.tensor(GAPS).repeat(sq)[:sq]
    new[lse == -torch.inf] = 0
    return old, Partial(new, lse)


def copy(part: Partial) -> Partial:
    return Partial(*(torch.empty_like(tensor).copy_(tensor) for tensor in part))


@pytest.mark.filterwarnings("ignore:(invalid|divide).*:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sq", "hn"), [(1, 16), (37, 20), (16, 64), (33, 128)])
def test_the_triton_merge_equals_torchs(triton_merge, dtype, sq, hn):
    old, new = parts(sq, hn, dtype)
    expected = copy(old)
    merge_into(*expected, new)
    triton_merge.merge_into(*old, new)
    assert_close(old.out, expected.out)
    assert_close(old.softmax_lse, expected.softmax_lse)


def test_the_triton_merge_takes_no_rows(triton_merge):
    old, new = parts(0, 16, torch.float32)
    triton_merge.merge_into(*old, new)


def test_rows_outside_the_merge_stay_as_they_were(triton_merge):
    running = PartialSum(torch.zeros(9, 1, 2, 8))
    running.merge_into = triton_merge.merge_into
    running.add_rows(3, 6, Partial(torch.ones(1, 2, 3, 8), torch.zeros(1, 2, 3)))
    touched = torch.zeros(9, dtype=torch.bool)
    touched[3:6] = True
    merged = running.merged()
    assert torch.equal((merged.out == 1).all(-1).all(1)[0], touched)
    assert torch.equal((merged.softmax_lse == 0).all(1)[0], touched)


def test_cuda_gets_the_triton_merge_and_a_cpu_torchs():
    assert merge_into_on(torch.device("cpu")) is merge_into
    assert merge_into_on(torch.device("cuda")).__module__ == MODULE


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_triton_merge_compiles_without_a_gpu(monkeypatch, tmp_path, capability, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = importlib.import_module(MODULE)._merge_rows
    pointers = {"out": "*fp32", "lse": "*fp32", "part_out": f"*{dtype}", "part_lse": "*fp32"}
    sizes = {name: "i32" for name in kernel.arg_names if name not in pointers}
    constants = {"num_rows": 16, "num_columns": 128}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=pointers | sizes | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    assert "cubin" in triton.compile(source, target=target).asm


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
