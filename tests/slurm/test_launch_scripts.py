"""The Slurm scripts' checks, and the command that they start; `srun` and `scontrol` are stand-ins."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_SUBMIT_DIR": str(REPOSITORY),
    "PYTHON": "/bin/true",
    "CHECKPOINT": "/models/llama",
    "MASTER_ADDR": "127.0.0.1",
}

PROGRAMS = {
    "convert.sbatch": "checkpoints_tools.convert_hf_to_megatron",
    "generate.sbatch": "launch/generate.py",
    "serve.sbatch": "launch/run_text_generation_server.py",
}


@pytest.fixture
def run_script(tmp_path):
    """Runs a script of launch/ with these variables; `srun` prints its arguments, one a line."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit "${SRUN_STATUS:-0}"\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(name, *args, **variables):
        command = ["bash", str(REPOSITORY / "launch" / name), *args]
        return subprocess.run(command, env=own | path | JOB | variables, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("tp", "cp", "line"),
    [
        (2, 3, "TP 2 x CP 3 needs 6 ranks, but 2 nodes x 4 tasks are 8: use CP=4"),
        (2, 8, "TP 2 x CP 8 needs 16 ranks, but 2 nodes x 4 tasks are 8: use CP=4 or --nodes=4"),
        (
            8,
            1,
            "TP 8 does not divide 4 tasks per node, so a TP group would cross nodes: use --ntasks-per-node=8",
        ),
        (3, 2, "use --ntasks-per-node=3 (with CP 2), or TP 2 with CP 4"),
        ("two", 2, "'two' of nodes '2', tasks per node '4', TP 'two', CP '2' is not a whole number"),
        (0, 2, "'0' of nodes"),
    ],
)
def test_a_grid_that_does_not_match_the_job_is_one_line_that_says_what_would(run_script, tp, cp, line):
    ended = run_script("generate.sbatch", TP=str(tp), CP=str(cp))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert line in ended.stderr


@pytest.mark.parametrize(
    ("experts", "line"),
    [
        ({"EP": "3"}, "EP 3 x EXPERT_TP 1 does not divide the 8 ranks of TP 2 x CP 4: use EP=2"),
        (
            {"EP": "8", "EXPERT_TP": "2"},
            "EP 8 x EXPERT_TP 2 does not divide the 8 ranks of TP 2 x CP 4: use EP=4",
        ),
        ({"EXPERT_TP": "3"}, "EXPERT_TP 3 does not divide the 8 ranks of TP 2 x CP 4: use EXPERT_TP=2"),
        ({"EP": "all"}, "'all' of EP 'all', EXPERT_TP '1' is not a whole number of at least 1"),
        ({"EXPERT_TP": "0"}, "'0' of EP '1', EXPERT_TP '0' is not a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("script", ["generate.sbatch", "serve.sbatch", "serve.sh"])
def test_experts_that_cannot_be_spread_over_the_job_are_one_line_that_says_what_would(
    run_script, script, experts, line
):
    ended = run_script(script, TP="2", CP="4", PORT="5985", **experts)
    assert (ended.returncode, ended.stderr) == (2, f"error: {line}\n")


@pytest.mark.parametrize("script", ["generate.sbatch", "serve.sbatch", "serve.sh"])
def test_how_experts_are_spread_is_passed_on(run_script, script):
    grid = {"TP": "2", "CP": "4", "PORT": "5984", "PYTHON": "/bin/echo"}
    alone = run_script(script, **grid).stdout.split()
    spread = run_script(script, **grid, EP="4", EXPERT_TP="2").stdout.split()
    assert alone[alone.index("--expert-model-parallel-size") + 1] == "1"
    assert "--expert-tensor-parallel-size" not in alone
    assert spread[spread.index("--expert-model-parallel-size") + 1] == "4"
    assert spread[spread.index("--expert-tensor-parallel-size") + 1] == "2"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"CHECKPOINT": ""}, "CHECKPOINT is not set"),
        ({"REPOSITORY": "/tmp"}, "No such file"),
        ({"PYTHON": "/no/python"}, "PYTHON is '/no/python', which does not run"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER is 'mpirun': it must be srun or torchrun"),
        ({"SLURM_TASKS_PER_NODE": "4,2"}, "nodes have different numbers of tasks (4,2)"),
    ],
)
def test_other_slips_are_refused_too(run_script, variables, line):
    ended = run_script("generate.sbatch", TP="2", CP="4", **variables)
    assert ended.returncode == 2
    assert line in ended.stderr


def test_one_task_is_one_rank_and_arguments_are_passed_on(run_script):
    ended = run_script(
        "generate.sbatch", "--top-k", "1", TP="2", CP="4", CONTEXT_FILE="a b.txt", QUERY="why?"
    )
    arguments = ended.stdout.splitlines()
    assert ended.returncode == 0
    assert arguments[:3] == ["--kill-on-bad-exit=1", "--distribution=block", "/bin/true"]
    assert arguments[3:6] == ["launch/generate.py", "--load", "/models/llama"]
    assert arguments[-6:] == ["--context-file", "a b.txt", "--query", "why?", "--top-k", "1"]


@pytest.mark.parametrize("script", ["generate.sbatch", "serve.sbatch"])
def test_sizes_that_are_set_are_passed_on_and_others_are_left_to_the_program(run_script, script):
    grid = {"TP": "2", "CP": "4", "PORT": "5986"}
    assert "--star" not in run_script(script, **grid).stdout
    sizes = {"BLOCK_SIZE": "8K", "ANCHOR_SIZE": "0", "PASSED_KEYS": "1K"}
    arguments = run_script(script, **grid, **sizes).stdout.splitlines()
    first = arguments.index("--star-block-size")
    assert arguments[first : first + 6] == (
        ["--star-block-size", "8K", "--star-anchor-size", "0", "--star-passed-keys", "1K"]
    )


def test_torchrun_is_started_once_a_node(run_script):
    arguments = run_script("generate.sbatch", TP="2", CP="4", LAUNCHER="torchrun").stdout.splitlines()
    assert {"--ntasks=2", "--ntasks-per-node=1", "--nnodes=2", "--nproc-per-node=4"} <= set(arguments)


def test_a_container_gets_the_repository_and_the_mounts(run_script):
    container = {"CONTAINER_IMAGE": "pytorch.sqsh", "CONTAINER_MOUNTS": "/models:/models", "PYTHON": "python"}
    arguments = run_script("generate.sbatch", TP="2", CP="4", **container).stdout.splitlines()
    assert "--container-image=pytorch.sqsh" in arguments
    assert f"--container-mounts={REPOSITORY}:{REPOSITORY},/models:/models" in arguments
    assert arguments[arguments.index("launch/generate.py") - 1] == "python"


def arguments_of_srun(ended) -> list[str]:
    """Without the line of the script itself."""
    return [line for line in ended.stdout.splitlines() if not line.startswith("serving on ")]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize(("script", "program"), PROGRAMS.items())
def test_apptainer_is_what_a_rank_starts_with(run_script, script, program, launcher):
    container = {"CONTAINER_IMAGE": "star.sif", "CONTAINER_RUNTIME": "apptainer", "PYTHON": "python"}
    variables = {"TP": "2", "CP": "4", "PORT": "5983", "HF": "/hf", "LAUNCHER": launcher}
    arguments = arguments_of_srun(run_script(script, **variables, **container, CONTAINER_MOUNTS="/models"))
    first = arguments.index("apptainer")
    assert all(argument.startswith("--") for argument in arguments[:first])
    mounts = f"{REPOSITORY}:{REPOSITORY},/models"
    own = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(REPOSITORY), "star.sif"]
    assert arguments[first : first + 8] == own
    assert arguments[first + 8] == ("python" if launcher == "srun" else "bash")
    assert program in arguments[first + 9 :]
    assert not any("--container" in argument for argument in arguments)


@pytest.mark.parametrize(("script", "program"), PROGRAMS.items())
def test_without_an_image_ranks_run_bare(run_script, script, program):
    variables = {"TP": "2", "CP": "4", "PORT": "5982", "HF": "/hf"}
    arguments = arguments_of_srun(run_script(script, **variables, CONTAINER_RUNTIME="apptainer"))
    assert arguments[2] == "/bin/true" and program in arguments[3:5]


def test_another_runtime_is_refused(run_script):
    container = {"CONTAINER_IMAGE": "star.sif", "CONTAINER_RUNTIME": "podman"}
    ended = run_script("generate.sbatch", TP="2", CP="4", **container)
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: CONTAINER_RUNTIME is 'podman': it must be pyxis or apptainer\n",
    )


@pytest.mark.parametrize(
    ("status", "restarts", "ends_with", "says"),
    [
        ("0", "0", 0, ""),
        ("2", "0", 2, ""),
        ("143", "0", 143, ""),
        ("137", "0", 0, "the ranks ended with status 137: requeueing job 7"),
        ("137", "3", 137, "and were restarted 3 times already"),
    ],
)
def test_ranks_that_died_are_started_again_and_wrong_input_is_not(
    run_script, status, restarts, ends_with, says
):
    ended = run_script(
        "serve.sbatch", TP="2", CP="4", SRUN_STATUS=status, SLURM_RESTART_COUNT=restarts, PORT="5987"
    )
    assert ended.returncode == ends_with
    assert says in ended.stderr
    assert ("scontrol requeue 7" in ended.stdout) == ("requeueing" in says and bool(says))


@pytest.mark.parametrize(("script", "variables"), [("serve.sbatch", {"CP": "4"}), ("serve.sh", {"CP": "1"})])
def test_a_port_in_use_is_refused_before_anything_starts(run_script, script, variables):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        ended = run_script(script, TP="2", PORT=port, **variables)
    assert ended.returncode == 2
    assert f"port {port} of" in ended.stderr and "is in use" in ended.stderr
    assert run_script(script, TP="2", PORT="http", **variables).stderr == (
        "error: PORT is 'http': it must be a number from 1 to 65535\n"
    )
