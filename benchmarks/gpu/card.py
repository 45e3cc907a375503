"""The machine that figures come from, and what its card does by itself. Said with every figure."""

import subprocess
from importlib import metadata
from pathlib import Path

import torch

import megatron_star
from benchmarks.gpu.bench import Bench
from benchmarks.measuring import machine_name
from megatron_star.job.code_version import code_fingerprint

PACKAGES = (
    "megatron-core",
    "transformers",
    "triton",
    "transformer-engine",
    "flash-attn",
    "fa3-fwd",
    "flash-attn-4",
)
MATMUL_SIZE, COPIED_BYTES = 8192, 4 << 30


def machine(bench: Bench) -> None:
    """Card, versions, and its own rates of matrix products and of copying."""
    found = {"card": machine_name(), "torch": torch.__version__, "code": commit()}
    found |= {name: version for name in PACKAGES if (version := _version(name))}
    size, num_bytes = MATMUL_SIZE, COPIED_BYTES
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(bench.device)
        found |= {"capability": f"{card.major}.{card.minor}", "gib": round(card.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": _cudnn_version()}
    else:
        size, num_bytes = size // 32, num_bytes >> 8
    left = torch.randn(size, size, device=bench.device, dtype=bench.dtype)
    matmul_s = bench.seconds(lambda: left @ left, repeats=5, warm=2, calls=3)
    source = torch.ones(num_bytes // 4, device=bench.device)
    target = torch.empty_like(source)
    copy_s = bench.seconds(lambda: target.copy_(source), repeats=5, warm=2)
    found |= {"matmul_tflops": 2 * size**3 / matmul_s / 1e12, "copy_gb_per_s": 2 * num_bytes / copy_s / 1e9}
    bench.figures.write("machine", "machine", **found)


def _cudnn_version() -> int | str:
    """The one that is loaded; torch refuses one that is older than what it was built with."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:
        return str(error).splitlines()[0]


def memory(bench: Bench) -> None:
    """What torch's allocator took at most since the last encoding began, and holds."""
    if bench.device.type != "cuda":
        bench.figures.write("memory", "memory", left_out="counted on GPUs only")
        return
    bench.figures.write(
        "memory",
        "allocator",
        max_gb=torch.cuda.max_memory_allocated(bench.device) / 1e9,
        reserved_gb=torch.cuda.max_memory_reserved(bench.device) / 1e9,
    )


def commit() -> str:
    """Of the checkout, and a fingerprint of the code, which a machine has that got a copy without git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        head = "no git"
    return f"{head} {code_fingerprint(Path(megatron_star.__file__).parent)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
