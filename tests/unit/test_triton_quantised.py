"""The Triton kernel for keys and values in 8 bits compiles for every GPU that it may meet."""

import importlib

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("stored", ["i8", "fp8e4nv"])
def test_the_kernel_compiles_without_a_gpu(monkeypatch, tmp_path, capability, stored):
    if (capability, stored) == (80, "fp8e4nv"):
        pytest.skip("the first GPUs with instructions for float8 have 8.9: kv_formats.HAS_FLOAT8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = importlib.import_module("megatron_star.attention.triton_quantised")._attend
    pointers = {"query": "*fp32", "key": f"*{stored}", "key_scale": "*fp32", "value": f"*{stored}"}
    pointers |= {"value_scale": "*fp32", "out": "*fp32", "lse": "*fp32"}
    sizes = {"softmax_scale": "fp32", "num_tokens": "i32"}
    constants = {"num_rows": 2, "heads": 4, "key_size": 128, "value_size": 128, "row_block": 16}
    constants |= {"key_block": 128, "value_block": 128, "num_keys": 64, "num_splits": 8}
    constants |= {"dtype": triton.language.bfloat16}
    signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    assert "cubin" in triton.compile(source, target=target).asm
