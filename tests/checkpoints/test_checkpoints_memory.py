"""Conversion needs the memory of a few tensors, not of the model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.chunks import chunks
from checkpoints_tools.families import family_named
from checkpoints_tools.hf_config import model_arguments
from checkpoints_tools.safetensors_output import Written, write_hf_weights

_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 14,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
_MEASURED = """
import resource, sys
from pathlib import Path
from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf
def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hf, megatron, back, fp8, decoded = map(Path, sys.argv[1:])
before = peak_bytes()
convert_hf_to_megatron.convert(hf, megatron)
convert_megatron_to_hf.convert(megatron, back)
convert_hf_to_megatron.convert(fp8, decoded)
print(peak_bytes() - before)
"""


def write_synthetic_checkpoint(directory: Path, config: dict) -> int:
    """A Hugging Face checkpoint of random float32 values; its size in bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    groups = [piece.sources for piece in chunks(family_named("llama"), model_arguments(config))]
    values = ([torch.rand(tensor.shape) for tensor in group] for group in groups)
    written = [[Written(tensor.name, tensor.shape, torch.float32) for tensor in group] for group in groups]
    write_hf_weights(directory, written, values)
    return (directory / "model.safetensors").stat().st_size


def store_as_fp8(hf: Path, directory: Path) -> None:
    """A copy whose linear layers are float8, with scales of 1."""
    tensors = {name: value.bfloat16() for name, value in load_file(hf / "model.safetensors").items()}
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones([size // 128 for size in tensors[name].shape])
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(_CONFIG | {"quantization_config": quantised}))


def test_both_directions_and_decoding_grow_the_process_by_a_small_part_of_the_model(tmp_path):
    size = write_synthetic_checkpoint(tmp_path / "hf", _CONFIG)
    store_as_fp8(tmp_path / "hf", tmp_path / "fp8")
    paths = [str(tmp_path / name) for name in ("hf", "megatron", "back", "fp8", "decoded")]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *paths], capture_output=True, text=True, check=True
    )
    growth = int(done.stdout)
    assert size > 230e6 and growth < 80e6, f"{growth / 1e6:.0f} MB for {size / 1e6:.0f} MB"
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        tmp_path / "hf/model.safetensors"
    ).read_bytes()
