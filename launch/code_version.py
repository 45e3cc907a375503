"""Whether all ranks of a job run the same code: nodes may have different checkouts or containers."""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

import megatron_star
from megatron_star.parallel.control import SharedError, gather_integers

PACKAGES = ("torch", "megatron-core")


def code_fingerprint(package: Path = Path(megatron_star.__file__).parent) -> int:
    """63 bits of a hash of the package's files and of the versions of what it is built on."""
    digest = hashlib.sha256(" ".join(version(name) for name in PACKAGES).encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(f"\0{path.relative_to(package)}\0".encode() + path.read_bytes())
    return int.from_bytes(digest.digest()[:8]) >> 1


def check_same_code(control: dist.ProcessGroup) -> None:
    """Raises SharedError on all ranks unless they run the same code; all ranks call this together."""
    check_same_fingerprints(gather_integers(code_fingerprint(), control))


def check_same_fingerprints(fingerprints: list[int]) -> None:
    """Raises SharedError that names the ranks whose fingerprint is not that of rank 0."""
    others = [str(rank) for rank, value in enumerate(fingerprints) if value != fingerprints[0]]
    if others:
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        raise SharedError(
            f"rank {shown}: other code than rank 0 (version {megatron_star.__version__}, its files, or the "
            f"version of {' or '.join(PACKAGES)}): install the same on all nodes"
        )
