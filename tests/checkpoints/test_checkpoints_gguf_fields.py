"""Small GGUF files, written for each test: what one says and is not understood is refused by name."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from random_models import hf_logits
from transformers import AutoTokenizer

from checkpoints_tools import convert_hf_to_megatron, from_gguf

TOKENS = ["<s>", "</s>", "<eot>", *"abcdef", "ab"]
HIDDEN, HEADS, LAYERS = 16, 2, 2


def fields(**changes: Any) -> dict[str, Any]:
    """Of a whole file; a change to None takes a field out. Double underscores stand for dots."""
    values = {
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": 24,
        "llama.attention.head_count": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 7,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        square = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes |= {f"blk.{layer}.{name}.weight": (HIDDEN, HIDDEN) for name in square}
        shapes |= {f"blk.{layer}.{name}.weight": (24, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (HIDDEN, 24)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_file(path: Path, values: dict[str, Any], of_tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds |= {str: writer.add_string, list: writer.add_array}
        kinds[type(value)](name, value)
    for name, value in of_tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_small_file_becomes_a_model_that_converts(tmp_path):
    from_gguf.convert(write_file(tmp_path / "a.gguf", fields(), tensors()), tmp_path / "hf")
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    assert hf_logits(tmp_path / "hf", [1, 2, 3]).isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("ab c").input_ids


def test_every_token_that_ends_an_answer_is_named(tmp_path):
    from_gguf.convert(write_file(tmp_path / "a.gguf", fields(), tensors()), tmp_path / "hf")
    text = (tmp_path / "hf/generation_config.json").read_text()
    assert "".join(text.split()) == '{"bos_token_id":0,"eos_token_id":[1,2],"pad_token_id":null}'


@pytest.mark.parametrize(
    "name, value",
    [
        ("llama__rope__scale_linear", 4.0),
        ("llama__rope__scaling__type", "yarn"),
        ("llama__rope__scaling__attn_factor", 1.2),
        ("llama__attention__sliding_window", 32),
        ("llama__attention__scale", 0.3),
        ("llama__attention__causal", False),
        ("llama__attention__value_length", 4),
        ("llama__rope__dimension_count", 4),
        ("llama__expert_count", 8),
        ("llama__logit_scale", 0.5),
        ("llama__something_of_next_year", 1),
        ("llama__vocab_size", 11),
        ("llama__attention__head_count", [2, 2]),
        ("llama__embedding_length", "16"),
        ("llama__block_count", None),
        ("split__count", 2),
        ("general__type", "adapter"),
        ("adapter__type", "lora"),
        ("tokenizer__ggml__add_space_prefix", True),
        ("tokenizer__ggml__add_eos_token", True),
        ("tokenizer__ggml__bos_token_id", 10),
        ("tokenizer__ggml__token_type", [1]),
        ("tokenizer__ggml__tokens", None),
        ("tokenizer__ggml__merges", ["abc"]),
    ],
)
def test_a_field_that_llama_models_do_not_heed_is_refused_by_name(tmp_path, name, value):
    file = write_file(tmp_path / "a.gguf", fields(**{name: value}), tensors())
    with pytest.raises(ValueError, match=f"a.gguf: .*{name.replace('__', '.')}"):
        from_gguf.convert(file, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in tensors().items() if key != name}


@pytest.mark.parametrize(
    "of_tensors, word",
    [
        (without("blk.1.ffn_up.weight"), r"model.layers.1.mlp.up_proj.weight is missing"),
        (without("token_embd.weight"), "token_embd.weight is missing"),
        (tensors() | {"blk.2.attn_norm.weight": np.ones(HIDDEN, "float32")}, "belongs to no layer"),
        (tensors() | {"blk.0.attn_norm.weight": np.ones(24, "float32")}, r"has shape \(24,\).*\(16,\)"),
        (tensors() | {"rope_freqs.weight": np.ones(4, "float32")}, "rope_freqs.weight is not supported"),
        (tensors() | {"output_norm.weight": np.full(HIDDEN, np.nan, "float32")}, "output_norm.weight holds"),
    ],
)
def test_tensors_that_are_not_those_of_the_fields_are_refused_by_name(tmp_path, of_tensors, word):
    file = write_file(tmp_path / "a.gguf", fields(), of_tensors)
    with pytest.raises(ValueError, match=f"a.gguf: .*{word}"):
        from_gguf.convert(file, tmp_path / "hf")


def test_the_dequantised_weights_are_in_hugging_faces_order(tmp_path):
    from_gguf.convert(write_file(tmp_path / "a.gguf", fields(), tensors()), tmp_path / "hf")
    found = from_gguf.GgufFile(tmp_path / "a.gguf").read("blk.0.attn_q.weight", HEADS)
    stored = torch.from_numpy(tensors()["blk.0.attn_q.weight"])
    assert torch.equal(found[:8], torch.cat([stored[0:8:2], stored[1:8:2]]))
