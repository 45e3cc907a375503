"""What a quantised checkpoint has that we do not understand is refused by its name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import FORMATS, compressed, edit, mxfp4_checkpoint, quantised_copy
from torch import Tensor

from checkpoints_tools import convert_hf_to_megatron
from checkpoints_tools.hf_checkpoint import open_hf_checkpoint
from checkpoints_tools.quantisation import quantisation_of


def described(**quantization_config: Any) -> Callable[[Path], None]:
    def write(hf: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        config["quantization_config"] |= quantization_config
        (hf / "config.json").write_text(json.dumps(config))

    return write


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda hf: edit(hf, change)


def not_described(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    del config["quantization_config"]
    (hf / "config.json").write_text(json.dumps(config))


_NAME = "model.layers.0.mlp.up_proj.weight"
REFUSED = {
    "another method": (described(quant_method="gptq"), "quant_method 'gptq' is not supported; fp8"),
    "no method": (described(quant_method=None), "quant_method None is not supported"),
    "an unknown key": (described(rotation="hadamard"), "rotation='hadamard' is not supported"),
    "experts in FP4": (described(expert_dtype="fp4"), "expert_dtype='fp4' is not supported"),
    "another float": (described(fmt="e5m2"), "fmt='e5m2' is not supported"),
    "blocks of one size": (
        described(weight_block_size=[8]),
        r"weight_block_size=\[8\]: it must be two sizes",
    ),
    "blocks of none": (described(weight_block_size=[8, 0]), r"weight_block_size\[1\]=0"),
    "blocks of another size": (
        described(weight_block_size=[8, 16]),
        r"q_proj.weight_scale_inv has shape \(8, 9\): not the scales of a weight of shape \(64, 72\) as "
        r"FP8 in blocks of 8 x 16 \(fp8\)",
    ),
    "a weight without scales": (
        tensors(lambda t: t.pop(f"{_NAME}_scale_inv")),
        f"{_NAME} has dtype 'F8_E4M3'; F32, BF16, F16 are supported, and what quantization_config",
    ),
    "scales without a weight": (
        tensors(lambda t: t.update({_NAME: t[_NAME].to(torch.bfloat16)})),
        f"{_NAME}_scale_inv is not a tensor of this family",
    ),
    "two kinds of scales": (
        tensors(lambda t: t.update({f"{_NAME}_scale": t[f"{_NAME}_scale_inv"].clone()})),
        f"{_NAME}_scale is not a tensor of this family",
    ),
    "scales that are integers": (
        tensors(lambda t: t.update({f"{_NAME}_scale_inv": t[f"{_NAME}_scale_inv"].long()})),
        f"{_NAME}_scale_inv has dtype I64, which no scale has",
    ),
    "a value that is no number": (
        tensors(lambda t: t[_NAME].view(torch.uint8)[3, 5:6].fill_(127)),
        f"{_NAME} holds values that are not finite",
    ),
    "nothing said of it": (not_described, "has dtype 'F8_E4M3'; F32, BF16, F16 are supported"),
}


@pytest.fixture(scope="module")
def fp8(converted, tmp_path_factory) -> Path:
    """A checkpoint in blocks of 8 x 8, which a test copies."""
    root = tmp_path_factory.mktemp("fp8")
    return quantised_copy(converted("llama2").hf, root / "hf", *FORMATS["blocks"][:3])


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_of_a_quantised_checkpoint_is_refused_by_name(fp8, tmp_path, change, message):
    hf = shutil.copytree(fp8, tmp_path / "hf")
    change(hf)
    with pytest.raises(ValueError, match=message):
        convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


REFUSED_GROUPS = {
    "packed integers": ({"format": "pack-quantized"}, "format='pack-quantized'"),
    "integers": (compressed("channel", type="int"), "'group_0' is not of symmetric 8-bit floats"),
    "four bits": (compressed("channel", num_bits=4), "'group_0' is not of symmetric 8-bit floats"),
    "zero points": (compressed("channel", symmetric=False), "'group_0' is not of symmetric 8-bit floats"),
    "groups of columns": (compressed("group", group_size=128), "strategy='group'"),
    "an order of columns": (compressed("channel", actorder="weight"), "actorder='weight'"),
    "no groups": ({"config_groups": {}}, "config_groups={}: it must say how weights are stored"),
    "a group that is none": ({"config_groups": {"a": 1}}, "'a' does not say how its weights are stored"),
    "sparse weights": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
    "ModelOpt's FP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4'"),
    "blocks of two sizes": (
        {
            "config_groups": {
                "a": compressed("block", block_structure=[8, 8])["config_groups"]["group_0"],
                "b": compressed("block", block_structure=[8, 4])["config_groups"]["group_0"],
            }
        },
        "blocks of several sizes",
    ),
    "something else": ("fp8", "quantization_config='fp8' is not supported"),
}


@pytest.mark.parametrize("changes, message", REFUSED_GROUPS.values(), ids=REFUSED_GROUPS)
def test_groups_of_weights_that_are_not_fp8_are_refused_by_name(changes, message):
    config = compressed("channel") | changes if isinstance(changes, dict) else changes
    with pytest.raises(ValueError, match=re.escape(message)):
        quantisation_of({"quantization_config": config})


def test_mxfp4_tensors_that_do_not_fit_each_other_are_refused_by_name(tmp_path):
    mxfp4_checkpoint(tmp_path / "hf")
    name = "model.layers.1.mlp.experts.down_proj"
    edit(tmp_path / "hf", lambda t: t.update({f"{name}_scales": t[f"{name}_scales"][:, :, :0]}))
    with pytest.raises(ValueError, match=f"{name}_blocks has shape .* not a weight as MXFP4"):
        open_hf_checkpoint(tmp_path / "hf")
