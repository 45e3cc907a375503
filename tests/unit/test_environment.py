"""A process finds its place from torchrun's variables, Slurm's, or none."""

import pytest

from megatron_star.job.environment import RankEnvironment, read_environment

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
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


def without(environ, name):
    """The variables but one."""
    return {key: value for key, value in environ.items() if key != name}


def test_without_a_launcher_there_is_one_rank():
    assert read_environment({}) == RankEnvironment(0, 1, 0, 1, "127.0.0.1", 0)


def test_torchruns_variables_are_used_even_inside_slurm():
    assert read_environment(SLURM | TORCHRUN) == RankEnvironment(3, 4, 1, 4, "node1", 29500)


def test_slurms_variables_are_used_and_the_port_follows_from_the_job():
    assert read_environment(SLURM) == RankEnvironment(2, 4, 0, 2, "n1", 20017)


def test_nodes_may_have_different_numbers_of_tasks():
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3", "SLURM_STEP_NUM_TASKS": "7"}
    assert read_environment(SLURM | uneven).local_world_size == 1


def test_a_batch_script_without_srun_is_one_process():
    assert read_environment(without(SLURM, "SLURM_STEP_ID")).world_size == 1


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_refused_by_the_missing_name(missing):
    with pytest.raises(ValueError, match=f"{missing} not set"):
        read_environment(without(TORCHRUN, missing))


@pytest.mark.parametrize(
    "missing", ["SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"]
)
def test_a_slurm_step_without_one_of_its_variables_is_refused_by_name(missing):
    with pytest.raises(ValueError, match=missing):
        read_environment(without(SLURM, missing))


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "4"), ("RANK", "x"), ("WORLD_SIZE", "-1"), ("MASTER_PORT", "")]
)
def test_values_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=value or "MASTER_PORT"):
        read_environment(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    ("local", "line"),
    [
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "local rank 2 on a node of 2 ranks"),
        ({"LOCAL_WORLD_SIZE": "8"}, "8 ranks on this node in a job of 4 ranks"),
    ],
)
def test_local_and_global_numbers_that_disagree_are_refused(local, line):
    with pytest.raises(ValueError, match=line):
        read_environment(TORCHRUN | local)


def test_left_over_rank_variables_that_disagree_with_the_slurm_step_are_refused():
    left_over = without(TORCHRUN, "TORCHELASTIC_RUN_ID") | {"RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(ValueError, match="rank 0 of 1, but Slurm started this process as task 2 of 4"):
        read_environment(SLURM | left_over)


def test_rank_variables_that_a_wrapper_set_from_the_slurm_step_are_used():
    by_hand = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    assert read_environment(SLURM | by_hand).rank == 2


def test_a_rank_takes_the_gpu_of_its_place_on_the_node_or_the_only_one_that_it_sees():
    environment = RankEnvironment(5, 8, 1, 4, "n1", 1)
    assert environment.device_index(4) == 1
    assert environment.device_index(1) == 0


def test_more_ranks_than_gpus_on_a_node_are_refused():
    with pytest.raises(ValueError, match="8 ranks were started on a node that shows 4 GPUs"):
        RankEnvironment(5, 8, 5, 8, "n1", 1).device_index(4)
