"""Checkpoints of latent attention: its rows, its scales, what is left out."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor,
    _yarn_get_mscale,
)
from quantised_models import FORMATS, quantised_copy
from quantised_models import edit as edit_tensors
from random_models import CONFIGS
from safetensors.torch import load_file, save_file
from small_arguments import arguments
from test_checkpoints_quantised import decoded_slowly, run_verify
from transformers import CONFIG_MAPPING
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, verify
from checkpoints_tools.chunks import chunks
from checkpoints_tools.families import FAMILIES
from checkpoints_tools.families.missing import MISSING
from checkpoints_tools.families.weight import KEY_HALVES, QUERY_HALVES
from checkpoints_tools.hf_config import model_arguments
from checkpoints_tools.inspect import inspect
from checkpoints_tools.layouts import Heads, fuse, split
from checkpoints_tools.safetensors_files import HfWeights
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.recorded_arguments import check_arguments
from megatron_star.model.rotary_frequencies import rotary_frequencies
from megatron_star.model.stored_weights import names_of_tensor


def edit(hf: Path, **changes) -> Path:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))
    return hf


# Rows, in both formats


def test_the_last_rows_of_each_head_are_those_of_two_halves_and_come_to_lie_side_by_side():
    rows, heads = torch.arange(12.0), Heads(2, 2, rotated=4)  # two heads of 2 values, and 4 that are rotated
    found = fuse(QUERY_HALVES, [rows], (12,), heads)
    assert found.tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
    assert fuse(KEY_HALVES, [rows], (12,), heads).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 9, 11]
    for layout in (QUERY_HALVES, KEY_HALVES):
        assert torch.equal(split(layout, fuse(layout, [rows], (12,), heads), [(12,)], heads)[0], rows)


def test_neighbors_rotate_as_the_halves_that_they_come_from():
    draw = torch.Generator().manual_seed(0)
    halves = torch.randn(2, 8, generator=draw)  # [heads, values]
    angles = torch.rand(4, generator=draw).repeat(2)[None]
    of_halves, _ = apply_rotary_pos_emb(*[halves[None, :, None]] * 2, angles.cos(), angles.sin())
    heads = Heads(2, 2, rotated=8)
    neighbors = fuse(QUERY_HALVES, [halves.flatten()], (16,), heads).view(1, 2, 1, 8)
    found, _ = apply_rotary_pos_emb_interleave(neighbors, neighbors, angles.cos(), angles.sin())
    assert torch.equal(found, of_halves)  # which transformers' own function, too, puts into halves


def test_a_head_has_the_rows_of_its_key_then_those_of_its_value(converted):
    """As Megatron's `MLASelfAttention` and transformers' `expand_kv` divide them."""
    pair = converted("deepseek_v3")
    info = read_checkpoint_info(pair.megatron)
    weights = MegatronWeights(pair.megatron / "release")
    [piece] = [
        piece
        for piece in chunks(FAMILIES[info.family], info.args)
        if piece.key.endswith("linear_kv_up_proj.weight") and piece.layer == 1
    ]
    keys, values = weights.read(piece).unflatten(0, (4, 12 + 14)).split([12, 14], dim=1)
    stored = load_file(pair.hf / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"]
    for head in range(4):
        assert torch.equal(keys[head], stored[head * 26 : head * 26 + 12])
        assert torch.equal(values[head], stored[head * 26 + 12 : (head + 1) * 26])


def test_a_norm_of_a_latent_is_found_by_either_of_megatrons_names(converted, monkeypatch, tmp_path):
    """Its TransformerEngine layers, which our checkpoints are of, have it in the projection after it."""
    key = "decoder.layers.self_attention.linear_kv_up_proj.layer_norm_weight"
    other = "decoder.layers.self_attention.kv_layernorm.weight"
    assert [*names_of_tensor(key)] == [key, other] and [*names_of_tensor(other)] == [other, key]
    pair = converted("youtu")
    stored = MegatronWeights(pair.megatron / "release")
    assert key in stored.tensors and other not in stored.tensors
    stored.tensors = {name.replace(key, other): value for name, value in stored.tensors.items()}
    info = read_checkpoint_info(pair.megatron)
    found = {stored.stored(piece)[0] for piece in stored.check(chunks(FAMILIES["youtu"], info.args))}
    assert other in found and found == stored.tensors.keys()


# Rotary embedding and scales


def random_yarn(draw: random.Random) -> dict:
    values = {
        "factor": (2.0, 40.0, 1.0, 0.5),
        "original_max_position_embeddings": (64, 4096),
        "rope_theta": (500.0, 5e4),
        "attention_factor": (1.3, 0.9, None),
        "beta_fast": (16, 1.0, 32.0),
        "beta_slow": (1.0, 0.5),
        "mscale": (0.7, 1.0, 0),
        "mscale_all_dim": (1.2, 1.0, 0.0),
    }
    found = {key: draw.choice(of_key) for key, of_key in values.items() if draw.random() < 0.7}
    return {"rope_type": draw.choice(("yarn", "yarn", "default")), "rope_theta": 1e4, "factor": 4.0} | found


def test_random_scales_are_those_of_transformers_of_scores_and_of_cosines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    draw, accepted = random.Random(0), 0
    base = json.loads(CONFIGS["deepseek_v3"].to_json_string())
    for _ in range(300):
        config = base | {"rope_parameters": random_yarn(draw)}
        try:
            args = model_arguments(config)
        except ValueError as error:
            assert str(error).startswith("config.json: "), config
            continue
        accepted += 1
        theirs = CONFIG_MAPPING["deepseek_v3"].from_dict(json.loads(json.dumps(config)))
        rotary = DeepseekV3RotaryEmbedding(theirs)
        assert torch.equal(rotary_frequencies(args), rotary.inv_freq), config
        of_cosines = of_scores = 1.0
        if args["position_embedding_type"] == "yarn":
            scales = [args[name] for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")]
            of_cosines = _yarn_get_concentration_factor(*scales)
            of_scores = _yarn_get_mscale(scales[0], scales[2]) ** 2
        assert of_cosines == pytest.approx(rotary.attention_scaling, rel=1e-9), config
        expected = DeepseekV3Attention(theirs, 0).scaling
        assert of_scores * args["kv_channels"] ** -0.5 == pytest.approx(expected, rel=1e-9), config
    assert accepted > 150


# FP8, as DeepSeek publishes it


def test_blocks_of_which_the_last_are_smaller_are_decoded_each_with_its_own_scale(
    converted, tmp_path, monkeypatch, capsys
):
    """DeepSeek's `kv_a_proj_with_mqa` has 576 rows in blocks of 128. Here it has 28 in blocks of 8, which
    transformers would take for blocks of 7."""
    hf = quantised_copy(converted("deepseek_v3").hf, tmp_path / "hf", *FORMATS["blocks"][:3])
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    of_model = load_file(converted("deepseek_v3").hf / "model.safetensors")[bias]
    edit_tensors(hf, lambda tensors: tensors.update({bias: of_model}))  # in float32
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert run_verify(monkeypatch, hf, tmp_path / "megatron") == 0
    assert "transformers does not decode FP8 in blocks of 8 x 8" in capsys.readouterr().out
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    stored, back = load_file(hf / "model.safetensors"), HfWeights(tmp_path / "back")
    assert torch.equal(back.read(bias), of_model) and of_model.dtype == torch.float32
    for name in ("self_attn.kv_a_proj_with_mqa", "mlp.experts.5.down_proj"):
        weight = f"model.layers.1.{name}.weight"
        scales = stored[f"{weight}_scale_inv"].tolist()
        expected = decoded_slowly(stored[weight], lambda i, j, scales=scales: scales[i // 8][j // 8])
        assert torch.equal(back.read(weight), expected.to(torch.bfloat16))


# What is left out, under other names, or refused


def with_prediction_layer(hf: Path, number: int) -> Path:
    """As DeepSeek publishes it: a layer like the last one, and what joins it to the model."""
    tensors = load_file(hf / "model.safetensors")
    last = "model.layers.1."
    added = {name.replace(last, f"model.layers.{number}."): value.clone() for name, value in tensors.items()}
    for name in ("eh_proj.weight", "enorm.weight", "shared_head.head.weight", "embed_tokens.weight"):
        added[f"model.layers.{number}.{name}"] = torch.full((3, 5), float("nan"))
    save_file(tensors | added, hf / "model.safetensors", {"format": "pt"})
    return hf


def test_layers_that_predict_several_tokens_are_left_out_with_a_note(converted, tmp_path, capsys):
    pair = converted("deepseek_v3")
    hf = edit(Path(shutil.copytree(pair.hf, tmp_path / "hf")), num_nextn_predict_layers=1)
    convert_hf_to_megatron.convert(with_prediction_layer(hf, 2), tmp_path / "megatron")
    assert "are no part of the language model, and left out: layers.2\n" in capsys.readouterr().err
    info = read_checkpoint_info(tmp_path / "megatron")
    assert info.args == read_checkpoint_info(pair.megatron).args
    assert verify.compare_tensors(hf, info).size == 0
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert HfWeights(tmp_path / "back").entries.keys() == HfWeights(pair.hf).entries.keys()
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_layers_that_config_json_does_not_count_are_refused(converted, tmp_path):
    hf = Path(shutil.copytree(converted("deepseek_v3").hf, tmp_path / "hf"))
    with_prediction_layer(hf, 2)  # num_nextn_predict_layers is 0
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* is not a tensor of this family"):
        convert_hf_to_megatron.convert(hf, tmp_path / "megatron")


def test_kimi_k2_is_deepseek_v3_under_another_name(converted, tmp_path, monkeypatch):
    pair = converted("deepseek_v3")
    hf = edit(Path(shutil.copytree(pair.hf, tmp_path / "hf")), model_type="kimi_k2")
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    info = read_checkpoint_info(tmp_path / "megatron")
    assert (info.family, info.args) == ("kimi_k2", read_checkpoint_info(pair.megatron).args)
    assert verify.compare_arguments(hf, info) == [] and verify.compare_tensors(hf, info).size == 0
    assert run_verify(monkeypatch, hf, tmp_path / "megatron") == 0


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_by_an_indexer_is_refused_by_name(model_type):
    config = json.loads(CONFIG_MAPPING[model_type]().to_json_string())
    assert config["index_topk"]
    with pytest.raises(ValueError) as error:
        model_arguments(config)
    assert f"model_type '{model_type}' is not supported (missing here: sparse attention" in str(error.value)
    assert "exact attention without the indexer is another model" in str(error.value)
    assert MISSING[model_type] in str(error.value)


REFUSED = {
    "an index beside it": ("deepseek_v3", {"index_topk": 2048}, "index_topk=2048"),
    "rotated halves": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
    "fewer heads of keys": ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    "biases of down-projections": ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    "an odd number of rotated values": ("youtu", {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7"),
    "another way to choose experts": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    "normalised weights, of which transformers knows nothing": (
        "deepseek_v2",
        {"norm_topk_prob": True},
        "norm_topk_prob=True",
    ),
    "groups that are not chosen by two experts": (
        "deepseek_v3",
        {"num_experts_per_tok": 2},
        "num_experts_per_tok=2",
    ),
    "more experts than the groups have": ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok=4"),
    "groups of different sizes": ("deepseek_v3", {"n_group": 3}, "n_group=3"),
    "experts in every second layer": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "no shared expert": ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts=0"),
    "another kind of MLP": ("glm4_moe_lite", {"mlp_layer_types": ["dense", "x"]}, "mlp_layer_types has 'x'"),
    "a rotary embedding of another type": (
        "youtu",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'linear'",
    ),
}


@pytest.mark.parametrize("name, changes, word", REFUSED.values(), ids=REFUSED)
def test_what_latent_attention_or_its_experts_do_not_compute_is_refused_by_name(name, changes, word):
    with pytest.raises(ValueError, match="config.json: ") as error:
        arguments(name, **changes)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_models_without_experts_or_with_them_in_all_layers_have_layers_of_one_kind():
    dense, every = (
        arguments("deepseek_v3", first_k_dense_replace=2),
        arguments("deepseek_v3", first_k_dense_replace=0),
    )
    assert not dense.get("num_experts") and every["moe_layer_freq"] == 1
    for args in (dense, every):
        check_arguments(args, "star_checkpoint.json")
        keys = {piece.key for piece in chunks(FAMILIES["deepseek_v3"], args)}
        assert "decoder.layers.self_attention.linear_kv_up_proj.weight" in keys  # of both layers
        assert any("router" in key for key in keys) == (args is every)


def test_inspect_says_the_sizes_of_latents_and_the_same_of_both_formats(converted):
    pair = converted("deepseek_v3")
    report = inspect(pair.megatron)
    assert report == inspect(pair.hf)
    assert (
        "\nheads                     4, of 12 and 8 rotated (keys), 14 (values), of a latent of 20\n"
        in report
    )
    # Of two layers a latent of 20 and a rotated key of 8, in float32.
    assert "\nKV cache                  224 bytes per token\n" in report
