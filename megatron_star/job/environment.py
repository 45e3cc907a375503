"""From a launcher's environment variables to this process's place: torchrun's, Slurm's, or none."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_star.parallel.control import DRIVER

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SET_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class RankEnvironment:
    """One process of a job. `master_addr` and `master_port` are where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    @property
    def is_driver(self) -> bool:
        """Whether this process is the driver; once there are groups, `control.is_driver` says it."""
        return self.rank == DRIVER

    def device_index(self, num_devices: int, *, may_share: bool = False) -> int:
        """Which of the GPUs that this process sees is its own: the only one, or that of its local rank.

        Where there is one only, other ranks may have the same (`devices.check_gpus_differ`).

        Args:
            may_share: go round where there are more ranks than GPUs.

        Raises:
            ValueError: this node has more ranks than GPUs.
        """
        if num_devices == 1:
            return 0  # Slurm has bound one to each task (--gpus-per-task), or there is one rank here
        if may_share:
            return self.local_rank % num_devices
        if self.local_rank >= num_devices:
            raise ValueError(
                f"local rank {self.local_rank} has no GPU: {self.local_world_size} ranks were started on a "
                f"node that shows {num_devices} GPUs"
            )
        return self.local_rank


def read_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Where this process stands.

    RANK and its kin come first: torchrun may run in a Slurm step. Those that torchrun did not set must agree
    with the step's own. A batch script's shell, without srun, is a single process.

    Raises:
        ValueError: variables are missing, are not numbers, or disagree.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        environment = _from_rank_variables(environ)
        if _in_slurm_step(environ) and SET_BY_TORCHRUN not in environ:
            _check_agreement(environment, environ)
        return _checked(environment)
    if _in_slurm_step(environ):
        return _checked(_from_slurm(environ))
    return RankEnvironment(0, 1, 0, 1, "127.0.0.1", 0)


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ


def _from_rank_variables(environ: Mapping[str, str]) -> RankEnvironment:
    missing = [name for name in RANK_VARIABLES if name not in environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set, although RANK or WORLD_SIZE is: start with torchrun or srun"
        )
    everywhere = {"LOCAL_WORLD_SIZE": environ["WORLD_SIZE"]}
    return RankEnvironment(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(everywhere | dict(environ), "LOCAL_WORLD_SIZE"),
        master_addr=environ["MASTER_ADDR"],
        master_port=_number(environ, "MASTER_PORT"),
    )


def _from_slurm(environ: Mapping[str, str]) -> RankEnvironment:
    port = environ.get("MASTER_PORT") or str(20000 + _number(environ, "SLURM_JOB_ID") % 20000)
    return RankEnvironment(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_this_node(environ),
        master_addr=environ.get("MASTER_ADDR") or _first_host(_text(environ, "SLURM_STEP_NODELIST")),
        master_port=_number({"MASTER_PORT": port}, "MASTER_PORT"),
    )


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
    """Slurm writes the tasks of each node as "2(x3),1": three nodes of two, one of one."""
    text, node, counts = _text(environ, "SLURM_STEP_TASKS_PER_NODE"), _number(environ, "SLURM_NODEID"), []
    for run in text.split(","):
        tasks, _, times = run.partition("(x")
        count = _number({"SLURM_STEP_TASKS_PER_NODE": tasks}, "SLURM_STEP_TASKS_PER_NODE")
        counts += [count] * int(times.rstrip(")") or 1)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE, {text}, has no such node")
    return counts[node]


def _first_host(node_list: str) -> str:
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"cannot tell the first host of {node_list}, because scontrol does not work here: set MASTER_ADDR"
        ) from error
    return hosts.stdout.split()[0]


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise ValueError(f"the environment variable {name} is not set, although Slurm sets it: use srun")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}: it must be a number")
    return int(text)


def _check_agreement(environment: RankEnvironment, environ: Mapping[str, str]) -> None:
    """RANK and WORLD_SIZE left over from somewhere would make every task of a step rank 0 of its own job."""
    task, num_tasks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    if (environment.rank, environment.world_size) != (task, num_tasks):
        raise ValueError(
            f"RANK and WORLD_SIZE say rank {environment.rank} of {environment.world_size}, but Slurm started "
            f"this process as task {task} of {num_tasks}: unset RANK and WORLD_SIZE, or start with torchrun"
        )


def _checked(environment: RankEnvironment) -> RankEnvironment:
    if environment.rank >= environment.world_size:
        raise ValueError(f"rank {environment.rank} in a job of {environment.world_size} ranks")
    if environment.local_rank >= environment.local_world_size:
        raise ValueError(
            f"local rank {environment.local_rank} on a node of {environment.local_world_size} ranks"
        )
    if environment.local_world_size > environment.world_size:
        raise ValueError(
            f"{environment.local_world_size} ranks on this node in a job of {environment.world_size} ranks"
        )
    return environment
