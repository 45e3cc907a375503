"""kill -9 of any rank, whatever the job is doing, ends all ranks within seconds and names the one."""

import signal
from pathlib import Path
from time import monotonic

import pytest
from programs import error_lines, start_ranks

JOB = str(Path(__file__).parent / "engine_job.py")
MOST_SECONDS = 10


@pytest.mark.parametrize("doing", ["idle", "encoding", "decoding"])
@pytest.mark.parametrize("killed", [0, 1])
def test_all_ranks_end_when_one_is_killed(checkpoints, doing, killed):
    _, megatron = checkpoints("qwen3")
    ranks = start_ranks(2, JOB, str(megatron), doing)
    assert ranks[0].stdout.readline() == "ready\n"

    ranks[killed].send_signal(signal.SIGKILL)
    start = monotonic()
    survivor = ranks[1 - killed]
    stderr = survivor.communicate(timeout=MOST_SECONDS)[1]

    assert monotonic() - start < MOST_SECONDS
    assert survivor.returncode == 1
    who = "rank 0 (the driver)" if killed == 0 else "rank 1"
    assert error_lines(stderr) == [f"error: {who} has ended; all ranks stop"]
