"""The kernels over addresses compile for every GPU that they may meet, and read 16 bytes at a time."""

import importlib
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is in torch's CUDA builds and in the extra `dev`")
MODULE = "megatron_star.attention.triton_tails"
INTEGERS = ("slots", "spans", "bases")
FLOATS = ("out", "lse", "outs", "lses", "start_lse")


def compiled(kernel: Any, capability: int, dtype: str, constants: dict[str, Any]) -> Any:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "softmax_scale":
            return "fp32"
        if name in INTEGERS:
            return "*i64"
        if name in FLOATS:
            return "*fp32"
        return f"*{dtype}" if name in ("query", "key", "value", "start_out") else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if "*" in kind(name)}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize(
    ("capability", "dtype", "size"), [(80, "fp32", 80), (90, "bf16", 128), (100, "fp16", 64)]
)
def test_the_kernels_compile_without_a_gpu(monkeypatch, tmp_path, capability, dtype, size):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module(MODULE)
    sizes = {"num_segments": 2, "key_size": size, "value_size": size}
    blocks = {"key_block": 128, "value_block": 128}
    tiles = {
        "heads": 4,
        "head_block": 16,
        "num_keys": 32,
        "num_splits": 4,
        "softcap": 30.0,
        "has_start": True,
    }
    attend = compiled(kernels._attend, capability, dtype, sizes | blocks | tiles)
    assert ", 0x10, " in attend.asm["ptx"]  # asynchronous copies of 16 bytes
    assert attend.metadata.shared < 99 << 10  # what the smallest of these GPUs gives a program
    for kernel, constants in (
        (kernels._append, sizes | blocks),
        (kernels._merge, {"num_splits": 4, "value_size": size, "value_block": 128}),
    ):
        assert "cubin" in compiled(kernel, capability, dtype, constants).asm
