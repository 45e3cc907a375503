"""Rotation and SwiGLU in Triton equal their twins, in Triton's interpreter, and compile for every GPU."""

import importlib
import sys

import pytest
import torch

from megatron_star.model.rotary import cosines_and_sines, rotate

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
MODULE = "megatron_star.speed.triton_elementwise"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-2}  # the twins round after each operation


@pytest.fixture
def kernels(monkeypatch):
    """The module with its kernels run by the interpreter, which a decorator decides at import."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rotary_size", "interleaved"), [(20, False), (20, True), (12, False), (12, True)])
@pytest.mark.parametrize(("num_rows", "num_heads"), [(1, 5), (3, 9), (0, 2)])
def test_query_and_key_are_rotated_in_place_as_torch_rotates_each(
    kernels, dtype, rotary_size, interleaved, num_rows, num_heads
):
    query = torch.randn(num_rows, 1, num_heads, 20).to(dtype)
    packed = torch.randn(num_rows, 1, 2, 3 * 20).to(dtype)
    key = packed[..., 20:40]  # strided, as keys are
    before = packed.clone()
    cos, sin = cosines_and_sines(torch.randn(num_rows, 1, 1, rotary_size // 2) * 9, 1.3, dtype)
    expected = [rotate(tensor, cos, sin, interleaved=interleaved) for tensor in (query, key)]
    kernels.rotate_in_place(query, key, cos, sin, interleaved=interleaved)
    torch.testing.assert_close([query, key], expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    before[..., 20:40] = packed[..., 20:40]
    assert torch.equal(packed, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_rows", "f"), [(1, 1500), (3, 37), (0, 8)])
def test_swiglu_is_the_gates_silu_times_up_in_the_gates_place(kernels, dtype, num_rows, f):
    gate_and_up = torch.randn(num_rows, 1, 2 * f).to(dtype)
    gate, up = gate_and_up.double().chunk(2, dim=-1)
    expected = (gate * gate.sigmoid() * up).to(dtype)
    out = kernels.swiglu_in_place(gate_and_up)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert out.data_ptr() == gate_and_up.data_ptr() and torch.equal(gate_and_up[..., f:], up.to(dtype))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_rotate", {"num_heads": 8, "num_pairs": 64, "interleaved": False}),
        ("_rotate", {"num_heads": 8, "num_pairs": 64, "interleaved": True}),
        ("_swiglu", {"num_columns": 1024}),
    ],
)
def test_they_compile_without_a_gpu(monkeypatch, tmp_path, capability, name, constants):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module(MODULE), name)
    pointers = {"query", "key", "cos", "sin", "gate_and_up"}
    types = {argument: "*bf16" if argument in pointers else "i32" for argument in kernel.arg_names}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    assert "cubin" in triton.compile(source, target=target).asm
