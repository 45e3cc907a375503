"""How much memory there is for KV."""

from pathlib import Path

import torch

KV_SHARE_OF_FREE_MEMORY = 0.6
"""The rest is for activations, transfers and fragmentation."""


def default_kv_budget(device: torch.device, ranks_on_this_machine: int) -> int:
    """Bytes of KV that this rank may hold, from what is free once the weights are loaded."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _available_bytes() // ranks_on_this_machine
    return int(KV_SHARE_OF_FREE_MEMORY * free)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo does not tell MemAvailable: set the KV budget")
