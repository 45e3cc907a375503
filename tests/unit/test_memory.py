"""The default KV budget heeds every limit: the machine's, those of control groups, and of the process."""

import resource
from pathlib import Path

import pytest
import torch

from megatron_star.job import memory
from megatron_star.job.memory import control_group_bytes, default_kv_budget, machine_bytes

GB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def version_2(root: Path, mounted: str, path: str, groups: dict[str, object]) -> Path:
    """A machine whose groups (below the mount) have these limits and use 1 GB, of which half is droppable."""
    files = {
        "proc/self/cgroup": f"0::{path}",
        "proc/self/mountinfo": f"31 23 0:28 {mounted} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw",
    }
    for group, limit in groups.items():
        folder = f"sys/fs/cgroup/{group}"
        files |= {f"{folder}/memory.max": limit, f"{folder}/memory.current": GB}
        files |= {f"{folder}/memory.stat": f"anon 5\ninactive_file {GB // 2}"}
    return write(root, files)


def test_a_group_of_version_2_and_those_above_it_count(tmp_path):
    groups = {"job": 8 * GB, "job/step": "max", "job/step/task": 4 * GB}
    left = list(control_group_bytes(version_2(tmp_path, "/", "/job/step/task", groups)))
    assert left == [4 * GB - GB // 2, 8 * GB - GB // 2]


@pytest.mark.parametrize(("mounted", "path"), [("/", "/"), ("/docker/ab", "/docker/ab"), ("/", "/not/shown")])
def test_a_container_sees_its_own_group_as_the_mount(tmp_path, mounted, path):
    left = list(control_group_bytes(version_2(tmp_path, mounted, path, {".": 4 * GB})))
    assert left == [4 * GB - GB // 2]


def test_a_group_of_version_1_counts(tmp_path):
    folder = "sys/fs/cgroup/memory/slurm/job"
    mount = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
    cpu = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
    files = {
        "proc/self/cgroup": "9:cpu:/\n4:memory:/slurm/job\n0::/",
        "proc/self/mountinfo": f"{cpu}\n{mount}",
        f"{folder}/memory.limit_in_bytes": 3 * GB,
        f"{folder}/memory.usage_in_bytes": GB,
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB // 4}",
        "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/slurm/memory.usage_in_bytes": GB,
    }
    left = list(control_group_bytes(write(tmp_path, files)))
    assert left == [2 * GB + GB // 4, 9223372036854771712 - GB]


def test_a_machine_without_groups_has_none(tmp_path):
    assert list(control_group_bytes(write(tmp_path, {"proc/self/cgroup": "0::/"}))) == []


def test_the_machines_memory_is_what_is_available(tmp_path):
    meminfo = "MemTotal:  999 kB\nMemAvailable:    1000 kB"
    assert machine_bytes(write(tmp_path, {"proc/meminfo": meminfo})) == 1000 * 1024
    with pytest.raises(OSError, match="set --star-kv-gigabytes"):
        machine_bytes(tmp_path / "nothing")


def test_the_least_of_all_limits_decides_and_ranks_share_what_is_the_machines(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 100 * GB)
    monkeypatch.setattr(memory, "control_group_bytes", lambda: iter([40 * GB, 60 * GB]))
    monkeypatch.setattr(memory, "process_bytes", lambda: iter([30 * GB]))
    cpu = torch.device("cpu")
    assert default_kv_budget(cpu, 2) == int(0.6 * 20 * GB)
    assert default_kv_budget(cpu, 1) == int(0.6 * 30 * GB)
    monkeypatch.setattr(memory, "process_bytes", lambda: iter([-5]))
    assert default_kv_budget(cpu, 1) == 0


@pytest.mark.parametrize("limited", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_of_the_process_counts_without_what_it_uses(monkeypatch, limited):
    status = memory._numbers(Path("/proc/self/status"))
    used = status["VmSize" if limited == resource.RLIMIT_AS else "VmData"] * 1024
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    limits = {limited: (used + 5 * GB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, infinite))
    (left,) = memory.process_bytes()
    assert left == pytest.approx(5 * GB, abs=GB // 4)


def test_this_machines_budget_is_within_its_memory():
    assert 0 < default_kv_budget(torch.device("cpu"), 1) < machine_bytes()
