"""Experts: which layers have them, how they are stored, and how much of them is read at a time."""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from megatron_ranks import logits_of
from quantised_models import FORMATS, edit, mxfp4_checkpoint, quantised_copy
from random_models import CONFIGS, hf_logits, random_token_ids
from test_checkpoints_conversion import assert_same_tensors
from transformers import AutoModelForCausalLM

from benchmarks.random_models import save_random_model
from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, safetensors_files, verify
from checkpoints_tools.hf_config import model_arguments
from checkpoints_tools.safetensors_files import HfWeights
from checkpoints_tools.safetensors_header import Entry, read_header
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.model.checkpoint import read_checkpoint_info, weights_directory

BY_RULE: dict[str, tuple[str, dict[str, Any]]] = {
    "every third layer": ("qwen2_moe", {"decoder_sparse_step": 3}),
    "every layer": ("qwen2_moe", {"decoder_sparse_step": 1}),
    "no layer": ("qwen2_moe", {"decoder_sparse_step": 7}),
    "every second layer but one": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "all but the first and the last": ("qwen3_moe", {"mlp_only_layers": [0, 5]}),
    "after no dense layer": ("glm4_moe", {"first_k_dense_replace": 0}),
    "after dense layers": ("glm4_moe", {"first_k_dense_replace": 4}),
    "after dense layers only": ("glm4_moe", {"first_k_dense_replace": 6}),
    "from a layer on": ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_interval": 1}),
    "to a layer, every second": (
        "ernie4_5_moe",
        {"moe_layer_start_index": 0, "moe_layer_end_index": 3, "moe_layer_interval": 2},
    ),
    "to the last layer": ("ernie4_5_moe", {"moe_layer_end_index": -1, "moe_layer_interval": 3}),
    "interleaved": ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 2}),
    "a list of layers": ("llama4_text", {"moe_layers": [0, 4]}),
}


@pytest.mark.parametrize("name, changes", BY_RULE.values(), ids=BY_RULE)
def test_the_layers_with_experts_are_those_of_transformers(name, changes):
    of_layers = {"layer_types": ["full_attention"] * 6, "no_rope_layers": [1] * 6}
    config = CONFIGS[name].to_dict() | {"num_hidden_layers": 6} | changes
    config |= {key: value for key, value in of_layers.items() if key in config}
    config = type(CONFIGS[name]).from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = [getattr(layer, "mlp", None) or layer.feed_forward for layer in model.model.layers]
    expected = [int(hasattr(block, "experts")) for block in blocks]
    args = model_arguments(json.loads(config.to_json_string()))
    assert bool(args.get("num_experts")) == any(expected)
    assert args.get("moe_layer_freq", expected) in (expected, 1 if all(expected) else None)


@pytest.mark.parametrize("name, are_alike", [("mixtral", True), ("qwen3_moe_dense_layers", False)])
def test_tensors_of_layers_are_stacked_where_all_layers_have_experts(converted, name, are_alike):
    keys = MegatronWeights(weights_directory(converted(name).megatron)).tensors.keys()
    assert ("decoder.layers.mlp.router.weight" in keys) == are_alike
    assert ("decoder.layers.2.mlp.router.weight" in keys) != are_alike
    assert "decoder.layers.1.mlp.router.weight" not in keys


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_dense_layers", "glm4_moe", "ernie4_5_moe"])
def test_experts_are_written_as_one_tensor_that_transformers_and_we_read_as_the_same(
    converted, tmp_path, name
):
    pair = converted(name)
    convert_megatron_to_hf.convert(pair.megatron, tmp_path / "fused", fused_experts=True)
    stored = HfWeights(tmp_path / "fused").entries
    assert (
        {key for key in stored if ".experts." in key}
        == {key for key in stored if key.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
        != set()
    )
    token_ids = random_token_ids()
    expected = hf_logits(pair.hf, token_ids)
    torch.testing.assert_close(hf_logits(tmp_path / "fused", token_ids), expected, rtol=0, atol=1e-5)
    convert_hf_to_megatron.convert(tmp_path / "fused", tmp_path / "megatron")
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(pair.hf, tmp_path / "back")


def fused_qwen(hf: Path) -> None:
    save_random_model(CONFIGS["qwen3_moe"], hf.parent / "one by one")
    convert_hf_to_megatron.convert(hf.parent / "one by one", hf.parent / "converted")
    convert_megatron_to_hf.convert(hf.parent / "converted", hf, fused_experts=True)


FUSED: dict[str, Callable[[Path], object]] = {
    "granitemoe": lambda hf: save_random_model(CONFIGS["granitemoe"], hf),
    "gpt_oss": lambda hf: save_random_model(CONFIGS["gpt_oss"], hf),
    "gpt_oss in MXFP4": mxfp4_checkpoint,
    "qwen3_moe of transformers 5": fused_qwen,
}


@pytest.mark.parametrize("save", FUSED.values(), ids=FUSED)
def test_of_all_experts_of_a_layer_one_is_read_and_written_at_a_time(tmp_path, monkeypatch, save):
    save(tmp_path / "hf")
    header = read_header(tmp_path / "hf/model.safetensors").values()
    of_experts = [entry for entry in header if len(entry.shape) > 2]
    read, read_one = [], safetensors_files._read
    monkeypatch.setattr(safetensors_files, "_read", lambda entry: read.append(entry) or read_one(entry))
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    assert len(of_experts) >= 4
    for whole in of_experts:
        parts = [entry for entry in read if whole.begin <= entry.begin < whole.end]
        assert sum(entry.end - entry.begin for entry in parts) == whole.end - whole.begin
        assert all(entry.end - entry.begin <= size_of_an_expert(whole) for entry in parts)
    info = read_checkpoint_info(tmp_path / "megatron")
    tensors = MegatronWeights(weights_directory(tmp_path / "megatron")).tensors
    experts = {key: stored for key, stored in tensors.items() if ".experts.experts." in key}
    assert len(experts) >= 2
    for stored in experts.values():
        assert tuple(stored.size[:2]) == (info.args["num_layers"], info.args["num_experts"])
        assert all(prod(chunk.sizes[:2]) == 1 for chunk in stored.chunks)


def size_of_an_expert(whole: Entry) -> int:
    return (whole.end - whole.begin) // whole.shape[0]


@pytest.mark.parametrize(
    ("name", "gate", "bias"),
    [
        ("glm4_moe", "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        ("ernie4_5_moe", "mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"),
    ],
)
def test_a_router_in_float32_beside_bfloat16_is_kept(tmp_path, name, gate, bias):
    save_random_model(CONFIGS[name], tmp_path / "hf", torch.bfloat16)
    edit(
        tmp_path / "hf",
        lambda t: t.update({n: v.float() * 1.0013 for n, v in t.items() if n.endswith((gate, bias))}),
    )
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    info = read_checkpoint_info(tmp_path / "megatron")
    assert info.dtype == torch.bfloat16
    assert verify.compare_tensors(tmp_path / "hf", info).size == 0
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    entries = HfWeights(tmp_path / "back").entries
    assert {entry.dtype for key, entry in entries.items() if key.endswith((gate, bias))} == {"F32"}
    assert entries["lm_head.weight"].dtype == "BF16"


def test_experts_of_one_tensor_beside_quantised_layers_are_verified(converted, tmp_path, monkeypatch):
    format_ = FORMATS["channels"][:3]
    hf = quantised_copy(converted("granitemoe").hf, tmp_path / "hf", *format_)
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    command = ["verify", "--hf", str(hf), "--megatron", str(tmp_path / "megatron")]
    monkeypatch.setattr("sys.argv", command)
    assert verify.main() == 0


def test_layers_that_predict_several_tokens_are_left_out_of_ernie(converted, tmp_path, capsys):
    shutil.copytree(converted("ernie4_5_moe").hf, tmp_path / "hf")
    extra = {f"model.mtp_{part}.0.weight": torch.ones(3) for part in ("emb_norm", "linear_proj")}
    edit(tmp_path / "hf", lambda t: t.update(extra))
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    assert "left out: mtp_emb_norm, mtp_linear_proj" in capsys.readouterr().err
    token_ids = random_token_ids()
    [found] = run_ranks(1, logits_of, str(tmp_path / "megatron"), token_ids, 1)
    torch.testing.assert_close(found, hf_logits(tmp_path / "hf", token_ids), rtol=0, atol=1e-4)
