"""Small random checkpoints whose weights are quantised, as public ones are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_models import VOCAB_SIZE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig

from benchmarks.random_models import save_random_model

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


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
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
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


_GPT_OSS = GptOssConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


def mxfp4_checkpoint(hf: Path) -> dict[str, Tensor]:
    """gpt-oss with random experts in MXFP4; what is stored."""
    save_random_model(_GPT_OSS, hf, torch.bfloat16)
    tensors = load_file(hf / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=draw, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, generator=draw, dtype=torch.uint8)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (hf / "config.json").write_text(json.dumps(config))
    return tensors


def edit(hf: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
