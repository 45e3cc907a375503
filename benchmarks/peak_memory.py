"""How much memory something needs at most."""

import ctypes
from pathlib import Path

import torch


class PeakMemory:
    """Bytes that this process (on CUDA: its device) needs at most from now on, beyond what it has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not be counted
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
            self.before = _status_bytes("VmRSS")

    def num_bytes(self) -> int:
        """So far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status_bytes("VmHWM") - self.before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))
