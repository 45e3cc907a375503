"""A process finds its place from torchrun's variables, Slurm's, or none."""

import pytest

from launch.environment import RankEnvironment, read_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "17",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "MASTER_ADDR": "n1",
}


def test_without_a_launcher_there_is_one_rank():
    assert read_environment({}) == RankEnvironment(0, 1, 0, 1, "127.0.0.1", 0)


def test_torchruns_variables_are_used_even_inside_slurm():
    assert read_environment(SLURM | TORCHRUN) == RankEnvironment(3, 4, 1, 4, "node1", 29500)


def test_slurms_variables_are_used_and_the_port_follows_from_the_job():
    assert read_environment(SLURM) == RankEnvironment(2, 4, 0, 2, "n1", 20017)


def test_a_batch_script_without_srun_is_one_process():
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert read_environment(batch).world_size == 1


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_refused_by_the_missing_name(missing):
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} not set"):
        read_environment(environ)


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "4"), ("RANK", "x"), ("WORLD_SIZE", "-1"), ("MASTER_PORT", "")]
)
def test_values_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=value or "MASTER_PORT"):
        read_environment(TORCHRUN | {name: value})
