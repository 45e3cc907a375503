"""Start the programs of launch/ as a user or a cluster would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def torchrun(num_ranks: int, program: str, *args: object, timeout: int = 120) -> subprocess.CompletedProcess:
    """One node's torchrun; stdout and stderr as text."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    return python(*launcher, REPOSITORY / program, *args, timeout=timeout)


def python(*args: object, timeout: int = 120) -> subprocess.CompletedProcess:
    """A process without a launcher; stdout and stderr as text."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def megatron_star(*args: object, folder: Path) -> subprocess.CompletedProcess:
    """The installed command, in a folder of its own; stdout and stderr as text."""
    command = [str(Path(sys.executable).with_name("megatron-star")), *map(str, args)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=120)


def start_ranks(
    num_ranks: int, *command: str, address: str = "127.0.0.1", port: int | None = None
) -> list[subprocess.Popen]:
    """Ranks that no launcher watches over, as under a plain srun; without a port, they meet at a free one."""
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port or _free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=ENVIRONMENT | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error_lines(stderr: str) -> list[str]:
    """The lines that say what is wrong."""
    return [line for line in stderr.splitlines() if line.startswith("error:")]
