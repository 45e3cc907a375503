"""What can be checked of the libraries themselves without a GPU; `make te-check` installs them."""

import importlib
from importlib import metadata

import gpu_ranks
import pytest
import torch
from distributed import run_ranks
from kernel_contract import tensors
from kernel_stubs import FLASH_ATTN_3_SCHEMA
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_star.attention import transformer_engine
from megatron_star.attention.kernels import KERNELS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the libraries")


@pytest.fixture
def installed():
    """A function that skips the test where a package is not installed."""

    def require(package: str) -> None:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: `make te-check` checks it")

    return require


@pytest.mark.parametrize("name", ["transformer-engine", "transformer-engine-sbhd", "transformer-engine-bshd"])
@pytest.mark.parametrize("causal", [False, True])
def test_transformer_engines_extension_takes_what_the_adapter_passes(installed, name, causal):
    """The call gets through Python and through the extension's own conversion, up to the missing GPU."""
    installed("transformer-engine")
    qkv = tensors(7, 7, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="non-CUDA DeviceType"):
        KERNELS[name].loaded()(*qkv, causal=causal, softmax_scale=1.0)


def test_transformer_engine_knows_the_names_that_the_adapter_uses(installed):
    installed("transformer-engine")
    library = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    assert library.FusedAttnBackend["F16_arbitrary_seqlen"] == 1
    for layout in ("sbhd", "bshd", "thd"):
        assert f"{layout}_{layout}_{layout}" in library.QKVLayout and layout in library.QKVFormat
    masks = {*transformer_engine.DENSE_MASKS.values(), *transformer_engine.PACKED_MASKS.values()}
    assert masks <= set(library.AttnMaskType)


def test_transformer_engines_layers_take_star_attention_and_the_same_checkpoints(installed, checkpoints):
    installed("transformer-engine")
    _, megatron = checkpoints("llama")
    ((local_keys, keys, classes),) = run_ranks(1, gpu_ranks.checkpoint_keys, str(megatron))
    assert keys == local_keys
    assert {"StarSelfAttention", "StarCoreAttention", "TELayerNormColumnParallelLinear"} <= set(classes)
    assert "TEDotProductAttention" not in classes


def test_flash_attention_3_has_the_operator_that_the_adapter_calls(installed):
    installed("fa3-fwd")
    KERNELS["flash-attn-3"].loaded()
    assert str(torch.ops.fa3_fwd.fwd.default._schema) == f"fa3_fwd::{FLASH_ATTN_3_SCHEMA}"


@pytest.mark.parametrize(("sq", "sk"), [(37, 37), (1, 5000)])
def test_flash_attention_4_compiles_for_blackwell(installed, monkeypatch, sq, sk):
    """Its compiler runs to the end without a GPU, square and causal, and with the keys split."""
    installed("flash-attn-4")
    for variable, value in {"ARCH": "sm_100", "NUM_SMS": "148"}.items():
        monkeypatch.setenv(f"FLASH_ATTENTION_{variable}", value)
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    kernel = KERNELS["flash-attn-4"].loaded()
    with FakeTensorMode():
        query = torch.empty(sq, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(sk, 1, 2, 64, dtype=torch.bfloat16, device="cuda")
        part = kernel(query, key, key, causal=sq == sk, softmax_scale=1.0)
    assert part.out.shape == (1, 8, sq, 64) and part.out.dtype == torch.bfloat16
    assert part.softmax_lse.shape == (1, 8, sq) and part.softmax_lse.dtype == torch.float32
