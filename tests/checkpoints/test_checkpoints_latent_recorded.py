"""What Megatron-LM and Megatron Bridge record of a model with latent attention is what config.json says."""

import argparse
from pathlib import Path

import pytest
import torch
import yaml
from distributed import run_ranks
from megatron_ranks import save_with_megatron
from small_arguments import arguments
from test_checkpoints_conversion import assert_same_tensors

from checkpoints_tools import convert_megatron_to_hf, recorded_by_megatron
from checkpoints_tools.megatron_args import args_for_megatron
from checkpoints_tools.torch_dist import MegatronWeights
from megatron_star.model.checkpoint import TRACKER_FILE


@pytest.fixture
def agree(monkeypatch):
    """Compares a model with the `args` that Megatron-LM has in our converted checkpoint, and with changes."""

    def check(model_args: dict, **changes) -> None:
        args = args_for_megatron(model_args, Path("tokenizer"), torch.bfloat16)
        recorded = {name: value for name, value in (vars(args) | changes).items() if value is not ...}
        state = {"args": argparse.Namespace(**recorded)}
        monkeypatch.setattr(recorded_by_megatron, "load_common_state_dict", lambda path: state)
        found = recorded_by_megatron.recorded_arguments(Path("weights"))
        recorded_by_megatron.check_agreement(Path("checkpoint"), found, model_args)

    return check


LATENT_MODELS = ["deepseek_v2", "deepseek_v3", "sarvam_mla", "youtu"]


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_megatron_gets_its_own_names_and_what_it_records_is_the_same_model(agree, name):
    model_args = arguments(name)
    args = args_for_megatron(model_args, Path("tokenizer"), torch.bfloat16)
    assert (args.position_embedding_type, args.rotary_interleaved) == ("rope", False)
    assert args.rope_type == model_args["position_embedding_type"]
    agree(model_args)
    agree(model_args, cache_mla_latents=True, mla_down_proj_fusion=True, kv_channels=18, num_query_groups=1)


def test_what_megatrons_local_layers_save_at_tp_2_is_described_and_converted(converted, tmp_path):
    """Their norms of latents have other names than ours, and each layer has keys of its own."""
    pair, weights = converted("deepseek_v3"), tmp_path / "trained/iter_0000007"
    weights.mkdir(parents=True)
    (tmp_path / "trained" / TRACKER_FILE).write_text("7")
    run_ranks(2, save_with_megatron, str(pair.megatron), str(weights), 2, {"non_homogeneous_layers": True})
    assert "decoder.layers.1.self_attention.kv_layernorm.weight" in MegatronWeights(weights).tensors
    convert_megatron_to_hf.convert(tmp_path / "trained", tmp_path / "back", hf_config=pair.hf)
    assert_same_tensors(pair.hf, tmp_path / "back")


DIFFERENT = {
    "multi_latent_attention": False,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "v_head_dim": 16,
    "qk_pos_emb_head_dim": 12,
    "rotary_scaling_factor": 3.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "latent_norm_epsilon": ...,  # then it is that of all norms
    "moe_router_group_topk": 1,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "moe_layer_freq": 1,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_recorded_value_that_the_configuration_does_not_have_is_refused_by_name(agree, name):
    words = {
        "original_max_position_embeddings": "yarn_original_max_position_embeddings",
        "beta_fast": "yarn_beta_fast",
        "qk_pos_emb_head_dim": "kv_channels",
        "multi_latent_attention": "rope_type='yarn'",  # of which other attention knows nothing
    }
    with pytest.raises(ValueError, match=f"{words.get(name, name)} is "):
        agree(arguments("deepseek_v3"), **{name: DIFFERENT[name]})


def test_megatrons_own_choice_of_groups_is_not_that_of_deepseek_v2(agree):
    with pytest.raises(ValueError, match="moe_router_group_score is 'top_sum' in the checkpoint, 'max'"):
        agree(arguments("deepseek_v2"), moe_router_group_score=...)


def test_what_megatron_bridge_records_of_deepseek_v3_is_the_same_model(tmp_path):
    model_args = arguments("deepseek_v3")
    path = "megatron.bridge.models.deepseek.deepseek_provider.DeepSeekV3ModelProvider"
    same = ("num_layers", "kv_lora_rank", "q_lora_rank", "v_head_dim", "mscale", "mscale_all_dim")
    recorded = {name: model_args[name] for name in same} | {
        "_target_": path,
        "multi_latent_attention": True,
        "qk_head_dim": 12,
        "qk_pos_emb_head_dim": 8,
        "qk_layernorm": True,
        "rotary_interleaved": False,
        "rope_type": "yarn",
        "position_embedding_type": "rope",
        "rotary_scaling_factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "cache_mla_latents": False,
        "num_moe_experts": 8,
        "moe_layer_freq": [0, 1],
        "moe_router_pre_softmax": True,  # says nothing of sigmoids
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 1.7,
    }

    def check(**changes) -> None:
        (tmp_path / "run_config.yaml").write_text(yaml.safe_dump({"model": recorded | changes}))
        found = recorded_by_megatron.recorded_arguments(tmp_path)
        recorded_by_megatron.check_agreement(tmp_path, found, model_args)

    check()
    with pytest.raises(ValueError, match=r"mscale_all_dim is 1.0 in the checkpoint, 0.6"):
        check(mscale_all_dim=1.0)


def test_yarn_with_a_factor_of_one_is_no_yarn(agree):
    agree(arguments("youtu"), rope_type=None, rotary_scaling_factor=1.0)
    with pytest.raises(ValueError, match="position_embedding_type is 'yarn' in the checkpoint, 'rope'"):
        agree(arguments("youtu"), rope_type=None, rotary_scaling_factor=40.0)
