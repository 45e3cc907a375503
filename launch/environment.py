"""From a launcher's environment variables to this process's place: torchrun's, Slurm's, or none."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankEnvironment:
    """One process of a job. `master_addr` and `master_port` are where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Where this process stands. Inside Slurm, torchrun's variables come first: it may run in a Slurm step.

    Raises:
        ValueError: variables are missing, are not numbers, or disagree.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _checked(_from_torchrun(environ))
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _checked(_from_slurm(environ))
    return RankEnvironment(0, 1, 0, 1, "127.0.0.1", 0)


def _from_torchrun(environ: Mapping[str, str]) -> RankEnvironment:
    missing = [name for name in TORCHRUN if name not in environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set, although RANK or WORLD_SIZE is: start with torchrun or srun"
        )
    return RankEnvironment(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(
            {"LOCAL_WORLD_SIZE": environ["WORLD_SIZE"]} | dict(environ), "LOCAL_WORLD_SIZE"
        ),
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
        master_addr=environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"]),
        master_port=_number({"MASTER_PORT": port}, "MASTER_PORT"),
    )


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
    """Slurm writes the tasks of each node as "2(x3),1": three nodes of two, one of one."""
    counts = []
    for run in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = run.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts[_number(environ, "SLURM_NODEID")]


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


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}: it must be a number")
    return int(text)


def _checked(environment: RankEnvironment) -> RankEnvironment:
    if environment.rank >= environment.world_size:
        raise ValueError(f"rank {environment.rank} in a job of {environment.world_size} ranks")
    return environment
