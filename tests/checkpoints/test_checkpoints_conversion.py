"""Both directions, for every family: the same bits, and the same logits at any tensor-parallel size."""

import json

import pytest
import torch
from distributed import run_ranks
from megatron_ranks import logits_of
from random_models import CONFIGS, hf_logits, random_token_ids
from safetensors.torch import load_file

from benchmarks.random_models import save_random_model
from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf
from checkpoints_tools.safetensors_files import HfWeights
from megatron_star.model.checkpoint import read_checkpoint_info


def assert_same_tensors(expected, found):
    expected, found = HfWeights(expected), HfWeights(found)
    assert expected.entries.keys() == found.entries.keys()
    for name in expected.entries:
        a, b = expected.read(name), found.read(name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_to_megatron_and_back_is_bit_identical(converted, tmp_path, name):
    pair = converted(name)
    convert_megatron_to_hf.convert(pair.megatron, tmp_path / "back")
    assert_same_tensors(pair.hf, tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (pair.hf / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path, dtype):
    save_random_model(CONFIGS["qwen2"], tmp_path / "hf", dtype)
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    assert read_checkpoint_info(tmp_path / "megatron").dtype == dtype
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")


def test_dtype_option_casts_and_config_json_says_so(converted, tmp_path):
    pair = converted("llama_tied")
    convert_hf_to_megatron.convert(pair.hf, tmp_path / "megatron", dtype=torch.bfloat16)
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(
        HfWeights(tmp_path / "back").read(name), HfWeights(pair.hf).read(name).to(torch.bfloat16)
    )
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "tp_size"),
    [*((name, 1) for name in CONFIGS), ("qwen2", 2), ("mixtral", 2), ("deepseek_v2_lite", 2)],
)
def test_logits_of_a_whole_sequence_are_those_of_hugging_face(converted, name, tp_size):
    """As `verify` compares them. tests/families runs every model on TP and CP ranks."""
    pair = converted(name)
    token_ids = random_token_ids()
    expected = hf_logits(pair.hf, token_ids)
    for found in run_ranks(tp_size, logits_of, str(pair.megatron), token_ids, tp_size):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.smollm2
@pytest.mark.parametrize("tp_size", [1, 3])
def test_smollm2_logits_are_those_of_hugging_face(smollm2, tp_size):
    token_ids = list(range(100, 140))
    # Both in float64: in float32, rounding alone takes up the bound on some processors.
    expected = hf_logits(smollm2.hf, token_ids, torch.float64)
    arguments = (str(smollm2.megatron), token_ids, tp_size, torch.float64)
    for found in run_ranks(tp_size, logits_of, *arguments):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.smollm2
def test_smollm2_to_megatron_and_back_is_bit_identical(smollm2, tmp_path):
    convert_megatron_to_hf.convert(smollm2.megatron, tmp_path / "back")
    assert_same_tensors(smollm2.hf, tmp_path / "back")


def test_weights_divided_over_files_are_read_by_safetensors(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints_tools.safetensors_output._MAX_FILE_BYTES", 150_000)
    pair = converted("llama3_scaled")
    convert_megatron_to_hf.convert(pair.megatron, tmp_path / "back")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and (tmp_path / "back/model.safetensors.index.json").is_file()
    found = {name: value for file in files for name, value in load_file(file).items()}
    for name, value in load_file(pair.hf / "model.safetensors").items():
        assert torch.equal(found[name], value), name
    assert torch.equal(hf_logits(tmp_path / "back", [5, 6, 7]), hf_logits(pair.hf, [5, 6, 7]))
