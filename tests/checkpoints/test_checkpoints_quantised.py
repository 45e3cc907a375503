"""Quantised checkpoints are decoded: to the values that the formats define, and that transformers decodes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import hf_logits, random_token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, verify
from checkpoints_tools.decoding import decode_fp8, decode_mxfp4
from checkpoints_tools.safetensors_files import HfWeights
from megatron_star.model.checkpoint import read_checkpoint_info

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def value_of_byte(byte: int) -> float:
    """Of a float8_e4m3fn: sign, four bits of exponent (bias 7), three of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def decoded_slowly(weight: Tensor, scale_of: Callable[[int, int], float]) -> Tensor:
    rows = weight.view(torch.uint8).tolist()
    return torch.tensor(
        [[value_of_byte(byte) * scale_of(i, j) for j, byte in enumerate(row)] for i, row in enumerate(rows)]
    )


def random_fp8(*shape: int) -> Tensor:
    bytes_ = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.where(bytes_ & 127 == 127, 0, bytes_).view(torch.float8_e4m3fn)


SCALES = {
    "blocks, the last of which are not whole": ((3, 3), (4, 3), lambda s: lambda i, j: s[i // 4][j // 3]),
    "rows": ((11, 1), None, lambda s: lambda i, j: s[i][0]),
    "rows, without a second axis": ((11,), None, lambda s: lambda i, j: s[i]),
    "the weight": ((), None, lambda s: lambda i, j: s),
    "the weight, with an axis": ((1,), (4, 3), lambda s: lambda i, j: s[0]),
}


@pytest.mark.parametrize("shape, block, scale_of", SCALES.values(), ids=SCALES)
def test_fp8_is_a_value_times_the_scale_of_its_block_row_or_tensor(monkeypatch, shape, block, scale_of):
    monkeypatch.setattr("checkpoints_tools.decoding._ROWS_AT_A_TIME", 5)
    weight, scale = random_fp8(11, 8), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected = decoded_slowly(weight, scale_of(scale.tolist()))
    assert torch.equal(decode_fp8(weight, scale, block), expected)


def test_scales_that_are_bytes_are_exponents():
    weight, exponents = random_fp8(4, 4), torch.tensor([[120, 127], [130, 0]], dtype=torch.uint8)
    expected = decode_fp8(weight, torch.exp2(exponents.float() - 127), (2, 2))
    assert torch.equal(decode_fp8(weight, exponents, (2, 2)), expected)
    assert torch.equal(decode_fp8(weight, exponents.view(torch.float8_e8m0fnu), (2, 2)), expected)


def test_mxfp4_is_what_transformers_makes_of_it():
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 6, 2, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(90, 150, (3, 6, 2), generator=draw, dtype=torch.uint8)
    assert torch.equal(decode_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The weight as FP8 and the scale of each block."""
    grid = [-(-size // of_block) for size, of_block in zip(weight.shape, block, strict=True)]
    scales, values = torch.empty(grid), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            where = tuple(slice(n * size, (n + 1) * size) for n, size in zip((i, j), block, strict=True))
            scales[i, j] = weight[where].abs().max() / _LARGEST
            values[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def quantised_copy(
    hf: Path, copy: Path, config: dict[str, Any], scale: str, store: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Path:
    """A copy whose linear layers are FP8, beside norms and embeddings in bfloat16."""
    shutil.copytree(hf, copy)
    tensors = {}
    for name, value in load_file(hf / "model.safetensors").items():
        tensors[name] = value.to(torch.bfloat16)
        if "_proj.weight" in name:
            tensors[name], tensors[name.removesuffix("weight") + scale] = store(value)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    described = json.loads((copy / "config.json").read_text()) | {"quantization_config": config}
    (copy / "config.json").write_text(json.dumps(described))
    return copy


def of_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(weight, (1, weight.shape[1]))


def of_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = quantise(weight, tuple(weight.shape))
    return values, scale[0, 0].to(torch.bfloat16)


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": strategy,
                    "symmetric": True,
                    "dynamic": False,
                    "observer": "minmax",
                    "group_size": None,
                    **weights,
                },
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "global_compression_ratio": 1.5,
    }


# 88 and 72 rows are no multiple of 64: the last blocks are smaller. transformers refuses those.
FORMATS = {
    "blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [8, 8]},
        "weight_scale_inv",
        lambda weight: quantise(weight, (8, 8)),
        (8, 8),
    ),
    "one scale a weight": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        "weight_scale_inv",
        of_tensor,
        (1000, 1000),
    ),
    "rows of FBGEMM": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "weight_scale",
        of_rows,
        (1, 1000),
    ),
    "channels": (compressed("channel"), "weight_scale", of_rows, (1, 1000)),
    "tensors": (compressed("tensor"), "weight_scale", of_tensor, (1000, 1000)),
    "uneven blocks": (
        compressed("block", block_structure=[64, 64]),
        "weight_scale",
        lambda weight: quantise(weight, (64, 64)),
        (64, 64),
    ),
    "ModelOpt": (
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.37.0"},
            "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 8, "type": "float"}}},
            "ignore": ["lm_head"],
        },
        "weight_scale",
        of_tensor,
        (1000, 1000),
    ),
}


def run_verify(monkeypatch, hf: Path, megatron: Path) -> int:
    monkeypatch.setattr("sys.argv", ["verify", "--hf", str(hf), "--megatron", str(megatron)])
    return verify.main()


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_is_decoded_to_bfloat16_and_back_to_one_that_is_not(
    converted, tmp_path, monkeypatch, capsys, name
):
    hf = quantised_copy(converted("llama_tied").hf, tmp_path / "hf", *FORMATS[name][:3])
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert read_checkpoint_info(tmp_path / "megatron").dtype == torch.bfloat16
    assert run_verify(monkeypatch, hf, tmp_path / "megatron") == 0
    by_transformers = FORMATS[name][0]["quant_method"] == "fp8"
    assert ("transformers does not decode" in capsys.readouterr().out) == (not by_transformers)

    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    stored, back = load_file(hf / "model.safetensors"), HfWeights(tmp_path / "back")
    weight = "model.layers.1.mlp.down_proj.weight"
    scales = stored[weight.removesuffix("weight") + FORMATS[name][1]].float()
    rows, columns = FORMATS[name][3]
    table = scales.reshape(scales.shape or (1, 1)).tolist()
    expected = decoded_slowly(stored[weight], lambda i, j: table[i // rows][j // columns])
    assert torch.equal(back.read(weight), expected.to(torch.bfloat16))
    assert back.entries.keys() == load_file(converted("llama_tied").hf / "model.safetensors").keys()


def test_transformers_own_decoding_has_the_same_logits(converted, tmp_path):
    hf = quantised_copy(converted("llama_tied").hf, tmp_path / "hf", *FORMATS["blocks"][:3])
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron", dtype=torch.float32)
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True),
    )
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([random_token_ids()])).logits[0]
    assert torch.equal(hf_logits(tmp_path / "back", random_token_ids()), expected)
