"""`verify` finds what it is for; `inspect` says what a checkpoint needs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_hf_to_megatron, verify
from checkpoints_tools.inspect import inspect
from megatron_star.model.checkpoint import DESCRIPTION_FILE, read_checkpoint_info


@pytest.fixture
def pair(converted, tmp_path):
    """A copy of a pair that the test may damage."""
    made = converted("llama3_scaled")
    return type(made)(*(Path(shutil.copytree(path, tmp_path / path.name)) for path in made))


def run(pair, monkeypatch, *options: str) -> int:
    command = ["verify", "--hf", str(pair.hf), "--megatron", str(pair.megatron), *options]
    monkeypatch.setattr("sys.argv", command)
    return verify.main()


def test_verify_accepts_a_conversion(pair, monkeypatch, capsys):
    assert run(pair, monkeypatch) == 0
    assert "tensors: all equal" in capsys.readouterr().out


def test_rounding_of_large_logits_is_no_difference(pair, monkeypatch, capsys):
    tensors = load_file(pair.hf / "model.safetensors")
    tensors["lm_head.weight"] *= 3000
    save_file(tensors, pair.hf / "model.safetensors")
    shutil.rmtree(pair.megatron)
    convert_hf_to_megatron.convert(pair.hf, pair.megatron)
    assert run(pair, monkeypatch) == 0
    found = float(capsys.readouterr().out.partition("largest difference ")[2].split()[0])
    assert found > 1e-4 and verify.tolerance(torch.tensor([30.0, -2.0])) == pytest.approx(3e-4)


def test_verify_names_the_one_value_that_differs(pair, monkeypatch, capsys):
    tensors = load_file(pair.hf / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] += 0.25
    save_file(tensors, pair.hf / "model.safetensors")
    assert run(pair, monkeypatch, "--skip-logits") == 1
    out = capsys.readouterr().out
    assert "differ by up to 0.25, at model.layers.2.mlp.up_proj.weight[5, 7]" in out


@pytest.mark.parametrize(
    "name, value", [("rotary_base", 1001), ("norm_epsilon", 1e-3), ("use_rope_scaling", False)]
)
def test_verify_finds_a_wrong_argument_by_name_and_in_the_logits(pair, monkeypatch, capsys, name, value):
    path = pair.megatron / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["megatron_args"][name] = value
    path.write_text(json.dumps(description))
    assert run(pair, monkeypatch) == 1
    out = capsys.readouterr().out
    assert f"MISMATCH {name}: {value!r}" in out and "MISMATCH logits differ" in out


def test_values_that_are_not_numbers_are_infinitely_different():
    found = verify._difference(torch.ones(2, 2), torch.tensor([[1.0, 1.0], [torch.nan, 1.0]]), "w")
    assert found == (float("inf"), "w[1, 0]")


def test_the_largest_difference_is_found_in_any_block_and_the_same_bits_are_equal(monkeypatch):
    monkeypatch.setattr(verify, "_BLOCK", 4)
    values = torch.arange(15.0).view(3, 5)
    values[0, 1] = torch.nan
    assert verify._difference(values, values.clone(), "w").size == 0
    other = values.nan_to_num(nan=1.0)
    changed = other.clone()
    changed[0, 3] += 0.25
    changed[2, 1] -= 0.5
    assert verify._difference(other, changed, "w") == (0.5, "w[2, 1]")


def test_inspect_says_the_same_of_both_checkpoints(converted):
    made = converted("llama3_scaled")
    of_megatron, of_hf = inspect(made.megatron), inspect(made.hf)
    assert of_megatron == of_hf
    assert "Llama-3 scaling by 32" in of_megatron and "5   no: num_attention_heads 4 cannot" in of_megatron


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3_moe"])
def test_inspect_counts_the_parameters_of_the_hugging_face_model(converted, name):
    made = converted(name)
    expected = sum(value.numel() for value in load_file(made.hf / "model.safetensors").values())
    assert f"{expected:,}" in inspect(made.megatron)


def test_the_description_names_source_tool_and_hashes(converted):
    made = converted("llama_tied")
    description = json.loads((made.megatron / DESCRIPTION_FILE).read_text())
    assert description["source"] == str(made.hf) and description["tool"].startswith("megatron-star ")
    assert all(len(digest) == 64 for digest in description["hashes"].values())
    assert description["hashes"].keys() >= {"weights", "config.json"}
    assert read_checkpoint_info(made.megatron).args["vocab_size"] == 259
