"""Which file, which tensor: what transformers reads is converted, and what would lose values is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron_ranks import logits_of
from random_models import hf_logits, random_token_ids
from safetensors.torch import load_file, save_file
from test_checkpoints_conversion import assert_same_tensors
from transformers import AutoModelForCausalLM

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf
from checkpoints_tools.inspect import inspect
from checkpoints_tools.safetensors_files import HfWeights


@pytest.fixture
def hf(converted, tmp_path) -> Callable[[str], Path]:
    """Gives a copy of a checkpoint that the test may change."""
    return lambda name: Path(shutil.copytree(converted(name).hf, tmp_path / "hf"))


def edit_weights(hf: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


def assert_same_logits(hf: Path) -> Path:
    """Of transformers and of the conversion, which is returned."""
    megatron = hf.parent / "megatron"
    convert_hf_to_megatron.convert(hf, megatron)
    token_ids = random_token_ids()
    [found] = run_ranks(1, logits_of, str(megatron), token_ids, 1)
    torch.testing.assert_close(found, hf_logits(hf, token_ids), rtol=0, atol=1e-4)
    return megatron


def test_a_tied_model_with_another_output_layer_in_its_file_is_untied(hf, tmp_path):
    path = hf("llama_tied")
    edit_weights(path, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    megatron = assert_same_logits(path)
    assert "untied output layer" in inspect(path) and inspect(path) == inspect(megatron)
    convert_megatron_to_hf.convert(megatron, tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(hf_logits(tmp_path / "back", [5, 6, 7]), hf_logits(path, [5, 6, 7]))


@pytest.mark.parametrize("stored", ["both", "lm_head"])
def test_a_tied_embedding_is_found_under_either_name(hf, tmp_path, stored):
    path = hf("llama_tied")
    edit_weights(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    if stored == "lm_head":
        edit_weights(path, lambda t: t.pop("model.embed_tokens.weight"))
    megatron = assert_same_logits(path)
    convert_megatron_to_hf.convert(megatron, tmp_path / "back")
    assert "lm_head.weight" not in HfWeights(tmp_path / "back").entries


def test_a_single_file_comes_before_an_index(hf):
    path = hf("qwen2")
    tensors = load_file(path / "model.safetensors")
    save_file({name: 0 * value for name, value in tensors.items()}, path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_logits(path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_transformers_stores_as_one_tensor_are_the_same_experts(converted, tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(converted(name).hf)
    shutil.copytree(converted(name).hf, tmp_path / "hf")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in HfWeights(tmp_path / "hf").entries
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(converted(name).hf, tmp_path / "back")
    assert inspect(tmp_path / "hf") == inspect(converted(name).megatron)


def test_scales_of_a_quantised_kv_cache_are_left_out(hf):
    path = hf("llama2")
    scales = {f"model.layers.{i}.self_attn.{kind}_scale": torch.ones(1) for i in range(3) for kind in "kv"}
    edit_weights(path, lambda t: t.update(scales))
    assert_same_logits(path)


def fused_of_other_experts(tensors: dict) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.ones(2, 176, 72)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.ones(2, 72, 88)


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}")


def index_of(weight_map: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        shutil.copy(path / "model.safetensors", path / "a.safetensors")
        (path / "model.safetensors").rename(path / "b.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda path: edit_weights(path, change)


NAME = "model.layers.1.input_layernorm.weight"
REFUSED = {
    "experts of another number": (
        "mixtral",
        weights(fused_of_other_experts),
        r"gate_up_proj has shape \(2, 176, 72\).*\(4, 176, 72\)",
    ),
    "an adapter": ("llama2", adapter, "adapter_config.json: an adapter"),
    "a tensor in two files": (
        "llama2",
        index_of({"x": "a.safetensors", "y": "b.safetensors"}),
        "b.safetensors: lm_head.weight is in .*a.safetensors",
    ),
    "a file elsewhere": (
        "llama2",
        index_of({"x": "../a.safetensors"}),
        "weight_map has '../a.safetensors'",
    ),
    "an index of something else": ("llama2", index_of(["a.safetensors"]), "weight_map="),
    "not a number": (
        "llama2",
        weights(lambda t: t[NAME].fill_(torch.nan)),
        f"{NAME} holds values that are not finite",
    ),
    "infinity": (
        "llama2",
        weights(lambda t: t[NAME][3:4].fill_(torch.inf)),
        f"{NAME} holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name, change, message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_what_it_seems_is_refused_by_name(hf, tmp_path, name, change, message):
    path = hf(name)
    change(path)
    with pytest.raises(ValueError, match=message):
        convert_hf_to_megatron.convert(path, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("direction", ["to megatron", "back"])
def test_a_cast_that_overflows_is_refused_by_the_tensors_name(hf, tmp_path, direction):
    path, name = hf("llama2"), "model.layers.2.self_attn.k_proj.weight"
    edit_weights(path, lambda t: t[name][3, 4:5].fill_(-7e4))
    to_megatron = torch.float16 if direction == "to megatron" else None
    with pytest.raises(ValueError, match=rf"{name} has a value of 70000, more than 65504"):
        convert_hf_to_megatron.convert(path, tmp_path / "megatron", dtype=to_megatron)
        convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", dtype=torch.float16)
    assert not (tmp_path / "back").exists()
