"""The language model inside a multimodal checkpoint is converted and comes back alone; the rest is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import CONFIGS as TEXT_CONFIGS
from random_models import hf_logits, random_token_ids
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, verify
from checkpoints_tools.hf_config import model_arguments
from checkpoints_tools.inspect import inspect
from checkpoints_tools.multimodal import text_config

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# A language model, and the kind of its vision tower.
_PARTS = {
    "mistral3": ("mistral", {"model_type": "pixtral"}),
    "llava": ("llama_tied", {"model_type": "clip_vision_model"}),
    "smolvlm": ("llama2", {}),
    "gemma3": ("gemma3_text", {}),
    "llama4": (
        "llama4_text",
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "internvl": ("qwen2", {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]}),
}


def multimodal_config(model_type: str) -> Any:
    text, vision = _PARTS[model_type]
    return CONFIG_MAPPING[model_type](
        text_config=TEXT_CONFIGS[text].to_dict() | {"final_logit_softcapping": None},
        vision_config=_VISION | vision,
        image_token_index=5,
        image_token_id=5,
        tie_word_embeddings=TEXT_CONFIGS[text].tie_word_embeddings,
    )


CONFIGS = {model_type: multimodal_config(model_type) for model_type in _PARTS}


def save_multimodal(config: Any, directory: Path) -> torch.Tensor:
    """Write a random checkpoint; its logits of the random token ids."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    model.save_pretrained(directory)
    model = model.language_model if config.model_type == "llama4" else model  # the whole does not run
    with torch.inference_mode():
        return model(input_ids=torch.tensor([random_token_ids()])).logits[0]


def rename(hf: Path, *rules: tuple[str, str]) -> None:
    tensors = load_file(hf / "model.safetensors")
    for old, new in rules:
        tensors = {re.sub(old, new, name): value for name, value in tensors.items()}
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


# As transformers 4 had it in memory, and 5 has.
_NEWER = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
)


# transformers knows one spelling of Llama 4's names.
_CASES = [
    (name, names)
    for name in CONFIGS
    for names in ("as saved", "newer")
    if (name, names) != ("llama4", "newer")
]


@pytest.mark.parametrize("name, names", _CASES)
def test_the_language_model_is_converted_and_comes_back_alone(tmp_path, capsys, monkeypatch, name, names):
    hf, megatron, back = (tmp_path / directory for directory in ("hf", "megatron", "back"))
    expected = save_multimodal(CONFIGS[name], hf)
    if names == "newer":
        rename(hf, *_NEWER)
    convert_hf_to_megatron.convert(hf, megatron)
    note = re.search(r"note: (\d+) tensors \(0\.000 GB\) are no part of .*", capsys.readouterr().err)
    stored = load_file(hf / "model.safetensors")
    left_out = [each for each in stored if re.match(r"(model\.)?(vision|multi_modal|connector)", each)]
    assert int(note[1]) == len(left_out) > 10 and "vision" in note[0]
    assert note[0] in inspect(hf) and "left out" not in inspect(megatron)

    convert_megatron_to_hf.convert(megatron, back)
    config = json.loads((back / "config.json").read_text())
    text_type = CONFIGS[name].text_config.model_type
    assert config["model_type"] == text_type and "vision_config" not in config
    assert config["architectures"] == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_type]]
    assert torch.equal(hf_logits(back, random_token_ids()), expected)
    assert len(load_file(back / "model.safetensors")) == len(stored) - len(left_out)

    monkeypatch.setattr("sys.argv", ["verify", "--hf", str(hf), "--megatron", str(megatron)])
    assert verify.main() == 0


def test_what_is_neither_text_nor_known_to_surround_it_is_refused_by_name(tmp_path):
    save_multimodal(CONFIGS["llava"], tmp_path / "hf")
    rename(tmp_path / "hf", (r"^vision_tower\.post_layernorm", "audio_tower.post_layernorm"))
    with pytest.raises(ValueError, match=r"audio_tower\.post_layernorm\.\w+ is not a tensor of this family"):
        convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")


def test_a_tensor_under_both_spellings_is_refused(tmp_path):
    save_multimodal(CONFIGS["llava"], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"] + 1
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in it twice"):
        convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")


REFUSED = {
    "a text model of no family": ({"model_type": "bert"}, "model_type 'bert' is not supported"),
    "no text model": (None, "text_config=None"),
    "a text model that is none": ([1], r"text_config=\[1\]"),
    "a text model of an unknown type": ({"model_type": "nobody"}, "transformers does not accept it"),
    "a soft cap of logits, which the whole has not": (
        TEXT_CONFIGS["gemma3_text"].to_dict(),
        "final_logit_softcapping=.* is not supported in llava",
    ),
    "a scale of logits, which the whole has not": (
        {"model_type": "cohere2"},
        "logit_scale=0.0625 is not supported in llava",
    ),
    "another scale of logits": (
        TEXT_CONFIGS["granite"].to_dict(),
        "logits_scaling=.* is not supported in llava",
    ),
    "what the family refuses": (TEXT_CONFIGS["llama2"].to_dict() | {"is_causal": False}, "is_causal=False"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_a_configuration_whose_language_model_cannot_be_converted(text, message):
    config = json.loads(CONFIGS["llava"].to_json_string()) | {"text_config": text}
    with pytest.raises(ValueError, match=message):
        model_arguments(text_config(config))


def test_a_multimodal_model_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="model_type 'qwen2_vl' is not supported"):
        model_arguments(text_config({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2"}}))
