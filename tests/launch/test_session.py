"""What happens to a job when something goes wrong on one of its ranks."""

import signal
import socket
from pathlib import Path
from time import monotonic

import pytest
from programs import error_lines, start_ranks

FAILING = str(Path(__file__).parent / "failing_rank.py")


def wait_for(processes) -> tuple[list[int], list[str], float]:
    """Exit statuses, stderr of each, and the seconds between the first end and the last."""
    outputs = [process.communicate(timeout=60)[1] for process in processes[::-1]][::-1]
    return [process.returncode for process in processes], outputs, monotonic()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_rank_that_raises_ends_ranks_that_nobody_watches(failing):
    start = monotonic()
    statuses, outputs, end = wait_for(start_ranks(3, FAILING, str(failing), "raises"))
    assert all(status == 1 for status in statuses)
    assert error_lines(outputs[failing]) == [f"error: rank {failing}: RuntimeError: a bug in a kernel"]
    others = [line for rank, output in enumerate(outputs) if rank != failing for line in error_lines(output)]
    assert all(f"rank {failing}" in line and "has ended; all ranks stop" in line for line in others)
    assert len(others) == (1 if failing else 2)  # the driver reports a worker; each worker, a lost driver
    assert end - start < 45  # two imports of Megatron on busy cores, not the timeout of 10 minutes


def test_an_error_of_the_users_input_on_one_rank_is_reported_once_by_the_driver():
    statuses, outputs, _ = wait_for(start_ranks(3, FAILING, "2", "checked"))
    assert statuses == [2, 2, 2]
    assert [error_lines(output) for output in outputs] == [["error: rank 2: no checkpoint here"], [], []]


def test_ranks_that_a_launcher_ends_after_the_driver_have_its_status():
    """As srun does at once, which then takes the largest status of all."""
    driver, *workers = start_ranks(3, FAILING, "2", "checked")
    driver.communicate(timeout=240)
    for worker in workers:
        worker.terminate()
    outputs = [worker.communicate(timeout=60) for worker in workers]
    assert [driver.returncode, *(worker.returncode for worker in workers)] == [2, 2, 2], outputs


def test_an_address_in_use_is_one_line_that_says_what_to_set():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        driver, worker = start_ranks(2, FAILING, "1", "raises", port=port)
        stderr = driver.communicate(timeout=60)[1]
        worker.kill()
        worker.communicate()
    assert driver.returncode == 2
    line = f"cannot listen at 127.0.0.1 port {port}, which is in use: choose another with MASTER_PORT="
    assert error_lines(stderr) == [f"error: rank 0: {line}"]
    assert "Traceback" not in stderr


def test_an_address_that_is_not_known_is_one_line_of_every_rank():
    ranks = start_ranks(2, FAILING, "1", "raises", address="no-such-host.invalid")
    statuses, outputs, _ = wait_for(ranks)
    assert statuses == [2, 2]
    for rank, output in enumerate(outputs):
        (line,) = error_lines(output)
        assert line.startswith(f"error: rank {rank}: ranks do not meet at no-such-host.invalid port ")


def test_ctrl_c_ends_a_rank_that_waits_in_a_collective():
    (rank,) = start_ranks(1, str(Path(__file__).parent / "deaf_rank.py"))
    assert rank.stdout.readline() == "ready\n"
    rank.send_signal(signal.SIGINT)
    stderr = rank.communicate(timeout=60)[1]
    assert rank.returncode == 1
    assert error_lines(stderr) == ["error: interrupted while waiting for other ranks"]
