"""Megatron's own code reads what we write, and we read what it, or Megatron Bridge, writes."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from distributed import run_ranks
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron_ranks import load_with_megatron, load_with_ours, logits_of, objects_wanted, save_with_megatron
from random_models import hf_logits, random_token_ids
from test_checkpoints_conversion import assert_same_tensors
from torch.distributed.checkpoint import FileSystemReader

from checkpoints_tools import convert_megatron_to_hf, describe
from megatron_star.model.checkpoint import TRACKER_FILE, read_checkpoint_info


@pytest.mark.parametrize("name, tp_size", [("llama_tied", 1), ("llama2", 2), ("qwen2", 2)])
def test_load_checkpoint_of_megatron_reads_ours_with_use_checkpoint_args(converted, name, tp_size):
    megatron = str(converted(name).megatron)
    theirs = run_ranks(tp_size, load_with_megatron, megatron, tp_size, 3)
    ours = run_ranks(tp_size, load_with_ours, megatron, tp_size)
    for rank in range(tp_size):
        assert theirs[rank].keys() == ours[rank].keys()
        for key, value in ours[rank].items():
            assert torch.equal(theirs[rank][key], value), key


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_every_object_that_megatrons_model_looks_for_is_there(converted, name):
    megatron = converted(name).megatron
    [wanted] = run_ranks(1, objects_wanted, str(megatron))
    stored = FileSystemReader(megatron / "release").read_metadata().state_dict_metadata
    assert len(wanted) >= 12 and set(wanted) <= stored.keys()


def test_args_hold_every_argument_of_the_description(converted):
    megatron = converted("qwen3").megatron
    args = load_common_state_dict(str(megatron / "release"))["args"]
    assert isinstance(args, Namespace)
    assert vars(args).items() >= dict(read_checkpoint_info(megatron).args).items()


@pytest.fixture(params=[None, {"non_homogeneous_layers": True}], ids=["stacked layers", "single layers"])
def trained(request, converted, tmp_path) -> Path:
    """A checkpoint that Megatron's dist_checkpointing saved at TP 2, with `args`."""
    weights = tmp_path / "trained/iter_0000007"
    weights.mkdir(parents=True)
    (tmp_path / "trained" / TRACKER_FILE).write_text("7")
    run_ranks(2, save_with_megatron, str(converted("qwen2").megatron), str(weights), 2, request.param)
    return tmp_path / "trained"


def test_a_checkpoint_that_megatron_saved_at_tp_2_is_described_loaded_and_converted(
    converted, trained, tmp_path, capsys
):
    hf = converted("qwen2").hf
    with pytest.raises(ValueError, match="does not say the family, the tokenizer; .*--hf-config"):
        convert_megatron_to_hf.convert(trained, tmp_path / "back")
    convert_megatron_to_hf.convert(trained, tmp_path / "back", hf_config=hf)
    assert_same_tensors(hf, tmp_path / "back")

    describe.add_description(trained, hf)
    token_ids = random_token_ids()
    [found] = run_ranks(1, logits_of, str(trained), token_ids, 1)
    torch.testing.assert_close(found, hf_logits(hf, token_ids), rtol=0, atol=1e-4)


def test_a_configuration_that_disagrees_with_the_checkpoints_args_is_refused_by_name(
    converted, trained, tmp_path
):
    hf = Path(shutil.copytree(converted("qwen2").hf, tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"norm_epsilon is 1e-06 in the checkpoint, 0\.001"):
        describe.describe(trained, hf)


_BRIDGE = {
    "_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen2ModelProvider",
    "num_layers": 3,
    "hidden_size": 72,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "layernorm_epsilon": 1e-6,
    "share_embeddings_and_output_weights": False,
    "add_qkv_bias": True,
    "rotary_base": 10000.0,
    "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
}


def test_a_checkpoint_of_megatron_bridge_is_read_with_a_configuration(converted, tmp_path):
    pair = converted("qwen2")
    bridge = tmp_path / "bridge"
    shutil.copytree(pair.megatron / "release", bridge / "iter_0000000")
    config = bridge / "iter_0000000/run_config.yaml"
    config.write_text(yaml.safe_dump({"model": _BRIDGE}))
    with pytest.raises(
        ValueError, match="does not say the family, the tokenizer, ffn_hidden_size, kv_channels"
    ):
        describe.describe(bridge, None)
    convert_megatron_to_hf.convert(bridge, tmp_path / "back", hf_config=pair.hf)
    assert_same_tensors(pair.hf, tmp_path / "back")

    config.write_text(yaml.safe_dump({"model": _BRIDGE | {"rotary_base": 500000}}))
    with pytest.raises(ValueError, match="rotary_base is 500000 in the checkpoint, 10000"):
        describe.describe(bridge, pair.hf)
