"""The machine that GPU figures come from: said with every figure. Exits with 1 where there is no GPU.

python benchmarks/gpu_machine.py
"""

import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-4")


def machine() -> dict[str, Any]:
    """Card, count, memory, versions and the time now."""
    card = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "card": card.name,
        "num_cards": torch.cuda.device_count(),
        "memory_gib": round(card.total_memory / 2**30, 1),
        "compute_capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Print it."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: nothing was run")
    for name, value in machine().items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
