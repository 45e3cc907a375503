"""What must be the same on all ranks of a job: nodes may have different checkouts, containers or scripts."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

import megatron_star
from megatron_star.model.checkpoint import CheckpointInfo, weights_directory
from megatron_star.parallel.control import SharedError, gather_integers

FOLDER = Path(megatron_star.__file__).parent
PACKAGES = ("torch", "megatron-core", "transformers")


def code_fingerprint(folder: Path) -> str:
    """A hash of the Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """By what they are, as `facts_of_code` has them."""
    return {f"version of {name}": version(name) for name in names}


def facts_of_code(command: Sequence[str]) -> dict[str, str]:
    """By name, what a rank runs, and what it was asked to do: its arguments."""
    packages = package_versions(PACKAGES)
    asked = {f"argument {number}": argument for number, argument in enumerate(command, 1)}
    return {
        "version of Python": ".".join(platform.python_version_tuple()[:2]),
        **packages,
        "code of megatron_star": code_fingerprint(FOLDER),
        **asked,
    }


def check_same_checkpoint(info: CheckpointInfo, control: dist.ProcessGroup) -> None:
    """Raises SharedError on all ranks unless they have the same checkpoint; before weights are read."""
    fingerprints = gather_integers(checkpoint_fingerprint(info), control)
    others = [str(rank) for rank, value in enumerate(fingerprints) if value != fingerprints[0]]
    if others:
        raise SharedError(
            f"rank {', '.join(others[:8])}: {info.directory} is another checkpoint there than on rank 0"
        )


def checkpoint_fingerprint(info: CheckpointInfo) -> int:
    """63 bits of a hash of what a checkpoint says it holds: its description, names and sizes of files."""
    weights = weights_directory(info.directory)
    files = sorted(path for path in weights.iterdir() if path.is_file())
    digest = hashlib.sha256(repr((sorted(info.args.items()), info.family, str(info.dtype))).encode())
    digest.update((weights / ".metadata").read_bytes())
    digest.update(repr([(path.name, path.stat().st_size) for path in files]).encode())
    return int.from_bytes(digest.digest()[:8]) >> 1
