"""Quantised checkpoints are decoded: to the values that the formats define, and that transformers decodes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantised_models import FORMATS, edit, mxfp4_checkpoint, of_tensor, quantised_copy
from random_models import CONFIGS, hf_logits, random_token_ids
from safetensors.torch import load_file
from test_checkpoints_multimodal import save_multimodal
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mistral3Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, verify
from checkpoints_tools.decoding import decode_fp8, decode_mxfp4
from checkpoints_tools.inspect import inspect
from checkpoints_tools.safetensors_files import HfWeights
from megatron_star.model.checkpoint import read_checkpoint_info


def value_of_byte(byte: int) -> float:
    """Of a float8_e4m3fn: sign, four bits of exponent (bias 7), three of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def decoded_slowly(weight: Tensor, scale_of: Callable[[int, int], float]) -> Tensor:
    rows = weight.view(torch.uint8).tolist()
    return torch.tensor(
        [[value_of_byte(byte) * scale_of(i, j) for j, byte in enumerate(row)] for i, row in enumerate(rows)]
    )


def random_fp8(*shape: int) -> Tensor:
    bytes_ = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.where(bytes_ & 127 == 127, 0, bytes_).view(torch.float8_e4m3fn)


SCALES = {
    "blocks, the last of which are not whole": ((3, 3), (4, 3), lambda s: lambda i, j: s[i // 4][j // 3]),
    "rows": ((11, 1), None, lambda s: lambda i, j: s[i][0]),
    "rows, without a second axis": ((11,), None, lambda s: lambda i, j: s[i]),
    "the weight": ((), None, lambda s: lambda i, j: s),
    "the weight, with an axis": ((1,), (4, 3), lambda s: lambda i, j: s[0]),
}


@pytest.mark.parametrize("shape, block, scale_of", SCALES.values(), ids=SCALES)
def test_fp8_is_a_value_times_the_scale_of_its_block_row_or_tensor(monkeypatch, shape, block, scale_of):
    monkeypatch.setattr("checkpoints_tools.decoding._ROWS_AT_A_TIME", 5)
    weight, scale = random_fp8(11, 8), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected = decoded_slowly(weight, scale_of(scale.tolist()))
    assert torch.equal(decode_fp8(weight, scale, block), expected)


def test_scales_that_are_bytes_are_exponents():
    weight, exponents = random_fp8(4, 4), torch.tensor([[120, 127], [130, 0]], dtype=torch.uint8)
    expected = decode_fp8(weight, torch.exp2(exponents.float() - 127), (2, 2))
    assert torch.equal(decode_fp8(weight, exponents, (2, 2)), expected)
    assert torch.equal(decode_fp8(weight, exponents.view(torch.float8_e8m0fnu), (2, 2)), expected)


def test_mxfp4_is_what_transformers_makes_of_it():
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 6, 2, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(90, 150, (3, 6, 2), generator=draw, dtype=torch.uint8)
    assert torch.equal(decode_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def run_verify(monkeypatch, hf: Path, megatron: Path) -> int:
    monkeypatch.setattr("sys.argv", ["verify", "--hf", str(hf), "--megatron", str(megatron)])
    return verify.main()


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_is_decoded_to_bfloat16_and_back_to_one_that_is_not(
    converted, tmp_path, monkeypatch, capsys, name
):
    hf = quantised_copy(converted("llama_tied").hf, tmp_path / "hf", *FORMATS[name][:3])
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert read_checkpoint_info(tmp_path / "megatron").dtype == torch.bfloat16
    assert run_verify(monkeypatch, hf, tmp_path / "megatron") == 0
    by_transformers = FORMATS[name][0]["quant_method"] == "fp8"
    assert ("transformers does not decode" in capsys.readouterr().out) == (not by_transformers)

    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    stored, back = load_file(hf / "model.safetensors"), HfWeights(tmp_path / "back")
    weight = "model.layers.1.mlp.down_proj.weight"
    scales = stored[weight.removesuffix("weight") + FORMATS[name][1]].float()
    rows, columns = FORMATS[name][3]
    table = scales.reshape(scales.shape or (1, 1)).tolist()
    expected = decoded_slowly(stored[weight], lambda i, j: table[i // rows][j // columns])
    assert torch.equal(back.read(weight), expected.to(torch.bfloat16))
    assert back.entries.keys() == load_file(converted("llama_tied").hf / "model.safetensors").keys()


def test_transformers_own_decoding_has_the_same_logits(converted, tmp_path):
    hf = quantised_copy(converted("llama_tied").hf, tmp_path / "hf", *FORMATS["blocks"][:3])
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron", dtype=torch.float32)
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True),
    )
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([random_token_ids()])).logits[0]
    assert torch.equal(hf_logits(tmp_path / "back", random_token_ids()), expected)


def test_experts_in_mxfp4_are_decoded_and_come_back_as_bfloat16(tmp_path, monkeypatch, capsys):
    stored = mxfp4_checkpoint(tmp_path / "hf")
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    assert "note: 4 tensors are stored as MXFP4 (mxfp4), and decoded" in capsys.readouterr().err
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    back = HfWeights(tmp_path / "back")
    for name in [name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")]:
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(back.read(name), expected)
    assert not any(name.endswith(("_blocks", "_scales")) for name in back.entries)
    assert run_verify(monkeypatch, tmp_path / "hf", tmp_path / "megatron") == 0


def test_fp8_inside_a_multimodal_checkpoint_is_decoded_as_ministral_3_has_it(tmp_path, monkeypatch, capsys):
    config = Mistral3Config(
        text_config={
            **CONFIGS["ministral3"].to_dict(),
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=5,
        tie_word_embeddings=False,
    )
    save_multimodal(config, tmp_path / "whole")
    described = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    hf = quantised_copy(tmp_path / "whole", tmp_path / "hf", described, "weight_scale_inv", of_tensor)
    edit(hf, lambda t: t.update({name: t[name].bfloat16() for name in t if "vision_tower" in name}))
    activations = "language_model.model.layers.0.self_attn.q_proj.activation_scale"
    edit(hf, lambda t: t.update({activations: torch.tensor(0.5)}))
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    notes = capsys.readouterr().err
    assert "14 tensors are stored as FP8 (fp8), and decoded" in notes and "vision_tower" in notes
    assert run_verify(monkeypatch, hf, tmp_path / "megatron") == 0


def test_a_quantised_output_layer_of_a_tied_model_is_its_own(converted, tmp_path):
    hf = quantised_copy(converted("llama_tied").hf, tmp_path / "hf", *FORMATS["one scale a weight"][:3])
    output, scale = of_tensor(load_file(hf / "model.safetensors")["model.embed_tokens.weight"].float() * 2)
    edit(hf, lambda t: t.update({"lm_head.weight": output, "lm_head.weight_scale_inv": scale}))
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    expected = decode_fp8(output, scale, None).to(torch.bfloat16)
    assert torch.equal(HfWeights(tmp_path / "back").read("lm_head.weight"), expected)


def test_inspect_says_how_a_quantised_checkpoint_is_stored(converted, tmp_path):
    report = inspect(quantised_copy(converted("llama2").hf, tmp_path / "hf", *FORMATS["blocks"][:3]))
    assert "note: 21 tensors are stored as FP8 in blocks of 8 x 8 (fp8), and decoded" in report
    assert "dtype                     bfloat16" in report
