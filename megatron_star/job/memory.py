"""How much memory there is for KV: on a CPU, the least that the machine, control groups and limits leave."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_star.parallel.control import SharedError, gather_integers, on_every_rank

KV_SHARE_OF_FREE_MEMORY = 0.6
"""The rest is for activations, transfers and fragmentation."""

ROOT = Path("/")
_LIMITS = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
"""What /proc/self/status counts of a process, and what limits it (ulimit -v, ulimit -d)."""


def agreed_kv_budget(
    asked_gigabytes: float | None,
    device: torch.device,
    ranks_on_this_machine: int,
    control: dist.ProcessGroup,
) -> int:
    """Bytes of KV that every rank may hold: what is asked for, or the least that a rank has room for.

    Raises:
        SharedError: on all ranks, if one of them has no room.
    """
    if asked_gigabytes is not None:
        return int(asked_gigabytes * 1e9)
    mine = on_every_rank(lambda: default_kv_budget(device, ranks_on_this_machine), control)
    budgets = gather_integers(mine, control)
    if min(budgets) == 0:
        raise SharedError(
            f"rank {budgets.index(0)} has no memory left for KV, within the limits of its machine, control "
            "group (Slurm, container) and process (ulimit): use more ranks, or set --star-kv-gigabytes"
        )
    return min(budgets)


def default_kv_budget(device: torch.device, ranks_on_this_machine: int) -> int:
    """Bytes of KV that this rank may hold, from what is free once the weights are loaded; 0 if nothing is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        shared = min([machine_bytes(), *control_group_bytes()]) // ranks_on_this_machine
        free = min([shared, *process_bytes()])
    return max(0, int(KV_SHARE_OF_FREE_MEMORY * free))


def machine_bytes(root: Path = ROOT) -> int:
    """What the kernel says is available without swapping."""
    available = _numbers(root / "proc/meminfo").get("MemAvailable")
    if available is None:
        raise OSError("/proc/meminfo does not tell MemAvailable: set --star-kv-gigabytes")
    return available * 1024


def process_bytes(root: Path = ROOT) -> Iterator[int]:
    """What each limit of this process leaves."""
    counted = _numbers(root / "proc/self/status")
    for name, limited in _LIMITS.items():
        limit, _ = resource.getrlimit(limited)
        if limit != resource.RLIM_INFINITY and name in counted:
            yield limit - counted[name] * 1024


def control_group_bytes(root: Path = ROOT) -> Iterator[int]:
    """What each control group leaves that this process is in, and each above it: of version 1 and 2.

    What the kernel keeps of files and can drop at once is not counted as used.
    """
    names = {
        "cgroup2": ("memory.max", "memory.current", "inactive_file"),
        "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for kind, folder in _control_groups(root):
        limit, usage, droppable = names[kind]
        try:
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            yield most - used + _numbers(folder / "memory.stat").get(droppable, 0)
        except (OSError, ValueError):
            continue  # the topmost group has no such files; "max" is no limit


def _control_groups(root: Path) -> Iterator[tuple[str, Path]]:
    """The kind and folder of each group of memory that this process is in, and of those above it."""
    for kind, mounted, mount_point in _mounts(root):
        for line in _lines(root / "proc/self/cgroup"):
            number, controllers, path = line.split(":", 2)
            if (number == "0") != (kind == "cgroup2"):
                continue
            if kind == "cgroup" and "memory" not in controllers.split(","):
                continue
            # In a container the mount may show the tree from this group on only.
            below = path.removeprefix(mounted).strip("/") if mounted != "/" else path.strip("/")
            folder = mount_point / below
            for group in (folder, *folder.parents):
                if group.is_dir():
                    yield kind, group
                if group == mount_point:
                    break


def _mounts(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Kind, what of the tree is mounted, and where: of control groups that may limit memory."""
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, system = line.partition(" - ")
        mounted, where = place.split()[3:5]
        kind, *_, options = system.split()
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield kind, mounted, root / where.lstrip("/")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> dict[str, int]:
    """The whole numbers of lines such as `MemAvailable:  1024 kB` or `inactive_file 1024`."""
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {words[0]: int(words[1]) for words in pairs if len(words) > 1 and words[1].isdecimal()}
