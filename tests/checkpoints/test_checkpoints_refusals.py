"""What cannot be converted or read is refused in one line that names the file or the key."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, from_gguf
from checkpoints_tools.hf_config import model_arguments, read_hf_config
from megatron_star.model.checkpoint import DESCRIPTION_FILE, read_checkpoint_info


@pytest.fixture
def hf(converted, tmp_path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(converted("llama3_scaled").hf, tmp_path / "hf"))


def edit_config(hf: Path, **changes: object) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))


def edit_weights(hf: Path, change) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors")


def assert_refused(hf: Path, *words: str) -> None:
    output = hf.parent / "output"
    with pytest.raises((ValueError, OSError)) as error:
        convert_hf_to_megatron.convert(hf, output)
    for word in words:
        assert word in str(error.value)
    assert not output.exists() and not list(hf.parent.glob(".output*"))


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt_neox"}, ["gpt_neox", "supported: llama, mistral, qwen2"]),
        ({"model_type": None}, ["None", "supported: llama"]),
        ({"model_type": "phi4_multimodal"}, ["phi4_multimodal", "LoRA adapters", "supported: llama"]),
        ({"sliding_window": 128}, ["sliding_window=128", "llama"]),
        ({"attention_bias": True}, ["q_proj.bias is not in the checkpoint"]),
        ({"mlp_bias": True}, ["gate_proj.bias is not in the checkpoint"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quant_method 'awq'", "mxfp4"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [-2.0]}},
            ["long_factor=[-2.0]", "larger than 0"],
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1e3}},
            ["rope_type 'dynamic'", "its base changes with every token"],
        ),
        (
            {"rope_parameters": ROPE | {"high_freq_factor": 0.5, "original_max_position_embeddings": 4096}},
            ["high_freq_factor=0.5", "at least low_freq_factor, 1.0"],
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"intermediate_size": 96}, ["model.safetensors", "gate_proj.weight", "(88, 72)", "(96, 72)"]),
    ],
)
def test_configurations_that_megatron_would_compute_differently(hf, changes, words):
    edit_config(hf, **changes)
    assert_refused(hf, *words)


def test_a_truncated_file(hf):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(hf, str(path), "truncated")


def test_a_file_that_is_not_safetensors(hf):
    (hf / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_refused(hf, "model.safetensors", "not a safetensors file")


def test_a_missing_shard(hf):
    (hf / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(hf, "model-00001-of-00002.safetensors", "lists it")


def test_only_a_legacy_weights_file(hf):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    assert_refused(hf, "pytorch_model.bin", "safetensors")


def test_a_missing_tensor(hf):
    edit_weights(hf, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(hf, "model.layers.1.mlp.up_proj.weight", "not in the checkpoint")


def test_a_tensor_that_the_family_does_not_have(hf):
    edit_weights(hf, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}))
    assert_refused(hf, "model.layers.1.self_attn.q_proj.bias", "not a tensor of this family")


def test_several_dtypes(hf):
    edit_weights(hf, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.bfloat16)}))
    assert_refused(hf, "model.norm.weight", "BF16", "--dtype")


def test_a_dtype_that_is_not_a_float(hf):
    edit_weights(hf, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype 'I8'"):
        convert_hf_to_megatron.convert(hf, hf.parent / "output", dtype=torch.float32)
    assert not (hf.parent / "output").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(hf, monkeypatch):
    usage = shutil.disk_usage(hf)._replace(free=1000)
    monkeypatch.setattr("checkpoints_tools.output.shutil.disk_usage", lambda path: usage)
    assert_refused(hf, "1,000 bytes free", "needed")


def test_both_spellings_of_the_rotary_parameters_say_the_same(hf):
    new = model_arguments(read_hf_config(hf))
    rope = json.loads((hf / "config.json").read_text())["rope_parameters"]
    edit_config(hf, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    assert model_arguments(read_hf_config(hf)) == new


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / DESCRIPTION_FILE).unlink(), "checkpoints_tools.describe"),
        (lambda d: (d / DESCRIPTION_FILE).write_text("{"), "not JSON"),
        (lambda d: (d / DESCRIPTION_FILE).write_text('{"format_version": 9}'), "format_version is 9"),
        (lambda d: (d / "release/.metadata").unlink(), "not a complete torch_dist checkpoint"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("soon"), "'soon' is neither"),
        (lambda d: (d / "release/mp_rank_00").mkdir(), "--ckpt-convert-format torch_dist"),
    ],
)
def test_megatron_checkpoints_that_cannot_be_read(converted, tmp_path, damage, message):
    directory = Path(shutil.copytree(converted("llama_tied").megatron, tmp_path / "megatron"))
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_checkpoint_info(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_a_hugging_face_directory_is_not_mistaken_for_a_converted_one(hf):
    with pytest.raises(FileNotFoundError, match="convert_hf_to_megatron"):
        read_checkpoint_info(hf)


def test_a_checkpoint_of_another_size_than_described(converted, tmp_path):
    directory = Path(shutil.copytree(converted("llama_tied").megatron, tmp_path / "megatron"))
    path = directory / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["megatron_args"]["ffn_hidden_size"] = 96
    path.write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match=r"linear_fc1\.weight has shape \(3, 176, 72\), expected \(3, 192, 72\)"
    ):
        convert_megatron_to_hf.convert(directory, tmp_path / "back")


def test_gguf_files_that_are_damaged_or_missing(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a\.gguf: not a whole GGUF file"):
        from_gguf.convert(tmp_path / "a.gguf", tmp_path / "output")
    with pytest.raises(FileNotFoundError, match=r"b\.gguf: no such file"):
        from_gguf.convert(tmp_path / "b.gguf", tmp_path / "output")


def test_the_command_prints_one_line_and_exits_with_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "checkpoints_tools.convert_hf_to_megatron",
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run([*command, "--hf", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"error: {tmp_path}/config.json: no such file")
        and done.stderr.count("\n") == 1
    )
