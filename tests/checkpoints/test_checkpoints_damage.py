"""Weights that are not those that were written do not run: the file, or the parameter, is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import RankError, run_ranks
from megatron_ranks import load_with_ours

from checkpoints_tools import convert_megatron_to_hf
from checkpoints_tools.safetensors_files import HfWeights
from megatron_star.model import weight_hashes
from megatron_star.model.checkpoint import DESCRIPTION_FILE, read_checkpoint_info
from megatron_star.model.weight_hashes import Share, checked_beside

WEIGHTS = "release/__0_0.distcp"


@pytest.fixture
def megatron(converted, tmp_path) -> Path:
    """A copy of a checkpoint that the test may damage."""
    return Path(shutil.copytree(converted("qwen2").megatron, tmp_path / "megatron"))


def change(name: str, of_bytes: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        of_bytes(data)
        (directory / name).write_bytes(data)

    return damage


def zero(data: bytearray) -> None:
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)


def flip(data: bytearray) -> None:
    data[len(data) // 3] ^= 4


def cut(data: bytearray) -> None:
    del data[-1000:]


DAMAGE = {
    "zeros": (change(WEIGHTS, zero), f"{WEIGHTS}: damaged"),
    "one bit": (change(WEIGHTS, flip), f"{WEIGHTS}: damaged"),
    "truncated": (change(WEIGHTS, cut), f"{WEIGHTS}: [0-9,]+ bytes, [0-9,]+ were written"),
    "one bit of the index": (change("release/.metadata", flip), r"release/\.metadata: damaged"),
    "missing": (lambda directory: (directory / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named_when_a_model_is_loaded_or_converted(megatron, tmp_path, damage, message):
    damage(megatron)
    with pytest.raises(RankError, match=message):
        run_ranks(1, load_with_ours, str(megatron), 1)
    with pytest.raises(ValueError, match=message):
        convert_megatron_to_hf.convert(megatron, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def without_hashes(directory: Path) -> None:
    description = json.loads((directory / DESCRIPTION_FILE).read_text())
    del description["weight_files"]
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description))


@pytest.mark.parametrize("damage", [change(WEIGHTS, cut), change("release/.metadata", cut)])
def test_files_that_nobody_has_hashed_and_torch_cannot_read_are_one_line(megatron, tmp_path, damage):
    without_hashes(megatron)
    damage(megatron)
    with pytest.raises(ValueError, match="release: cannot be read") as error:
        convert_megatron_to_hf.convert(megatron, tmp_path / "back")
    assert "\n" not in str(error.value).strip()
    with pytest.raises(RankError, match="DamagedWeights: .*release: cannot be read"):
        run_ranks(1, load_with_ours, str(megatron), 1)


@pytest.mark.parametrize("value, converts", [(float("nan"), False), (float("inf"), False), (1.0, True)])
def test_a_value_that_is_not_a_number_is_named_with_its_parameter(megatron, tmp_path, value, converts):
    without_hashes(megatron)
    data = bytearray((megatron / WEIGHTS).read_bytes())
    weight = convert_and_read(megatron, tmp_path / "before")
    at = data.find(weight.numpy().tobytes())
    data[at : at + 4] = torch.tensor([value]).numpy().tobytes()
    (megatron / WEIGHTS).write_bytes(data)
    if converts:
        assert convert_and_read(megatron, tmp_path / "after")[0] == 1
        return
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds values that are not finite"):
        convert_megatron_to_hf.convert(megatron, tmp_path / "after")
    with pytest.raises(RankError, match=r"final_layernorm\.weight holds values that are not finite"):
        run_ranks(1, load_with_ours, str(megatron), 1)


def test_a_buffer_that_is_not_a_number_is_named_too(converted, tmp_path):
    """The bias of a router's choice: with it an expert that is not a number would always be chosen."""
    pair = converted("deepseek_v3")
    megatron = Path(shutil.copytree(pair.megatron, tmp_path / "megatron"))
    without_hashes(megatron)
    bias = HfWeights(pair.hf).read("model.layers.1.mlp.gate.e_score_correction_bias")
    data = bytearray((megatron / WEIGHTS).read_bytes())
    at = data.find(bias.numpy().tobytes())
    data[at : at + 4] = torch.tensor([float("nan")]).numpy().tobytes()
    (megatron / WEIGHTS).write_bytes(data)
    with pytest.raises(RankError, match=r"router\.expert_bias holds values that are not finite"):
        run_ranks(1, load_with_ours, str(megatron), 1)


def convert_and_read(megatron: Path, output: Path) -> torch.Tensor:
    """The last norm's weight."""
    convert_megatron_to_hf.convert(megatron, output)
    return HfWeights(output).read("model.norm.weight")


def test_a_hash_that_was_changed_is_refused_before_anything_is_read(megatron):
    path = megatron / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    wrong = description | {"hashes": description["hashes"] | {"weights": "0" * 64}}
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"hashes\.weights is not that of weight_files"):
        read_checkpoint_info(megatron)
    description["weight_files"][WEIGHTS]["sha256"][0] = "0" * 64
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"hashes\.weights is not that of weight_files"):
        read_checkpoint_info(megatron)


def test_ranks_of_a_machine_share_the_blocks_and_find_all_damage_together(monkeypatch, tmp_path):
    monkeypatch.setattr(weight_hashes, "BLOCK_BYTES", 1000)
    (tmp_path / "a").write_bytes(bytes(range(256)) * 20)
    files = weight_hashes.hash_files(tmp_path, ["a"], lambda num_bytes: None)
    data = bytearray((tmp_path / "a").read_bytes())
    data[3500] ^= 1
    (tmp_path / "a").write_bytes(data)
    found = []
    for index in range(3):
        try:
            with checked_beside(tmp_path, files, Share(index, 3)):
                pass
        except ValueError as error:
            found.append((index, str(error)))
    assert [index for index, _ in found] == [0] and "3,000 to 4,000" in found[0][1]


def test_what_is_not_to_be_verified_is_not(megatron, tmp_path):
    DAMAGE["one bit"][0](megatron)
    convert_megatron_to_hf.convert(megatron, tmp_path / "back", verify_weights=False)
    assert (tmp_path / "back/model.safetensors").exists()
