"""Ranks of a job that fail, differ or take their time: all end together, or all go on."""

import json
import shutil

import job_ranks
import pytest
from distributed import run_ranks


@pytest.fixture
def broken(checkpoints, tmp_path) -> tuple[str, str]:
    """A checkpoint, and one that lacks a tensor which the model needs."""
    _, megatron = checkpoints("qwen3")
    copy = tmp_path / "other"
    shutil.copytree(megatron, copy)
    description = json.loads((copy / "star_checkpoint.json").read_text())
    description["megatron_args"]["num_layers"] += 1
    (copy / "star_checkpoint.json").write_text(json.dumps(description))
    return str(megatron), str(copy)


def test_a_checkpoint_that_one_rank_cannot_load_ends_the_load_on_all(broken):
    good, bad = broken
    first, second = run_ranks(2, job_ranks.loads_of, [good, bad], ["auto"] * 2, [()] * 2)
    assert first == second and first.startswith(f"rank 1: {bad}: ")


def test_a_kernel_that_one_rank_does_not_have_ends_the_load_on_all(broken):
    good, _ = broken
    first, second = run_ranks(2, job_ranks.loads_of, [good] * 2, ["auto", "flash_attn_2"], [()] * 2)
    assert first == second and first.startswith("rank 1: ")


def test_layers_that_one_rank_cannot_compile_end_the_load_on_all(broken):
    good, _ = broken
    first, second = run_ranks(2, job_ranks.loads_of, [good] * 2, ["auto"] * 2, [(), (10**6,)])
    assert first == second and first.startswith("rank 1: layers cannot be compiled for 1000000 sequences")


@pytest.mark.parametrize(("world_size", "tp_size"), [(2, 1), (4, 2)])
def test_weights_of_other_bits_are_named_and_other_layouts_are_not(world_size, tp_size):
    assert run_ranks(world_size, job_ranks.weights_compared, tp_size, None) == ["the same"] * world_size
    last = world_size - 1
    messages = run_ranks(world_size, job_ranks.weights_compared, tp_size, last)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"rank {last} has read other weights than rank {last % tp_size}")


def test_the_driver_may_work_for_longer_than_the_groups_timeout():
    assert run_ranks(2, job_ranks.driver_takes_its_time) == ["done", "done"]


def test_what_the_driver_prepares_is_used_there_and_what_it_cannot_prepare_ends_all_ranks(checkpoints):
    _, megatron = checkpoints("qwen3")
    used, of_worker = run_ranks(2, job_ranks.engine_used, str(megatron), False)
    assert used[0].startswith("documents for ") and of_worker == []
    assert run_ranks(2, job_ranks.engine_used, str(megatron), True) == [["no such document"]] * 2
