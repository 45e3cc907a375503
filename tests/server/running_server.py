"""A server for tests, started as plain srun would: its ranks, its log, and requests to it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "launch/run_text_generation_server.py"
GOOD = {"prompts": ["The capital of France is"], "tokens_to_generate": 1, "top_k": 1}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Until it holds."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not come true"
        sleep(0.05)


@dataclass
class RunningServer:
    """Ranks and where they write."""

    port: int
    ranks: list[subprocess.Popen]
    logs: list[Path] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self, seconds: float = 240) -> None:
        """Until /health says so; fails with the log if a rank ends."""
        deadline = monotonic() + seconds
        while monotonic() < deadline:
            assert all(rank.poll() is None for rank in self.ranks), self.log()
            try:
                if httpx.get(f"{self.url}/health").json()["ready"]:
                    return
            except httpx.HTTPError:
                pass
            sleep(0.2)
        raise AssertionError(f"not ready in {seconds} s:\n{self.log()}")

    def log(self, rank: int = 0) -> str:
        """What a rank has written."""
        return self.logs[rank].read_text()

    def put(self, body: dict[str, Any] = GOOD, **options: Any) -> httpx.Response:
        """PUT /api, as tools/text_generation_cli.py of Megatron does."""
        headers = {"Content-Type": "application/json; charset=UTF-8"}
        return httpx.put(f"{self.url}/api", json=body, headers=headers, timeout=60, **options)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        """POST a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def resident_bytes(self) -> int:
        """Memory of the driver."""
        pages = Path(f"/proc/{self.ranks[0].pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def signal(self, number: int) -> None:
        """To all ranks, as a launcher does."""
        for rank in self.ranks:
            rank.send_signal(number)

    def statuses(self, seconds: float) -> list[int]:
        """Exit statuses, within so many seconds."""
        deadline = monotonic() + seconds
        return [rank.wait(timeout=max(0.1, deadline - monotonic())) for rank in self.ranks]

    def end(self) -> None:
        """Whatever it does."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
                rank.wait()


def start_server(
    checkpoint: Path,
    directory: Path,
    *arguments: str,
    num_ranks: int = 2,
    port: int | None = None,
    driver_output: int | None = None,
) -> RunningServer:
    """CP ranks; not ready yet. The driver writes to `driver_output` where that is given."""
    port = port or free_port()
    command = [sys.executable, str(PROGRAM), "--load", str(checkpoint)]
    command += ["--context-parallel-size", str(num_ranks), "--fp32", "--port", str(port), *arguments]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",  # milliseconds
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Whatever a request would leave on the disk, it would leave here.
        **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(directory)),
    }
    server = RunningServer(port, [])
    for rank in range(num_ranks):
        server.logs.append(directory / f"rank{rank}.log")
        with server.logs[rank].open("w") as log:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = os.environ | shared | own
            output = log if rank or driver_output is None else driver_output
            server.ranks.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=directory)
            )
    return server
