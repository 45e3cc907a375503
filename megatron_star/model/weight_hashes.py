"""Hashes of a checkpoint's weight files, by blocks, so that several threads and ranks can share the work.

{"release/__0_0.distcp": {"bytes": 538000000, "sha256": [one of each block of 64 MiB]}}
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_star.model.checked_values import CheckedValues

BLOCK_BYTES = 1 << 26
_READ_BYTES = 1 << 20
_MOST_THREADS = 4
_DIGEST = re.compile(r"[0-9a-f]{64}")

WeightFiles = Mapping[str, Mapping[str, Any]]


class DamagedWeights(ValueError):
    """Weights that cannot be read, or are not those that were written."""


class Share(NamedTuple):
    """Which blocks a process checks: every `count`-th from `index` on. Processes of a machine share them."""

    index: int = 0
    count: int = 1


WHOLE = Share()


def hash_files(directory: Path, names: list[str], advance: Callable[[int], object]) -> dict[str, Any]:
    """The hashes of files below `directory`; `advance` is told the bytes of each block."""
    blocks = [(name, number) for name in names for number in range(_num_blocks(directory / name))]
    found = {name: {"bytes": (directory / name).stat().st_size, "sha256": []} for name in names}
    with ThreadPoolExecutor(_num_threads()) as pool:
        digests = pool.map(lambda block: _digest(directory / block[0], block[1]), blocks)
        for (name, number), digest in zip(blocks, digests, strict=True):
            found[name]["sha256"].append(digest)
            advance(min(BLOCK_BYTES, found[name]["bytes"] - number * BLOCK_BYTES))
    return found


def root_hash(files: WeightFiles) -> str:
    """One hash of all the hashes."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def check_record(files: Any, root: Any, source: Path) -> None:
    """Raises ValueError unless `files` is a record as above, whose hash is `root`."""
    values = CheckedValues({"weight_files": files}, source)
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise values.wrong("weight_files", "the sizes and hashes of the weights' files")
    if root_hash(files) != root:
        raise ValueError(
            f"{source}: hashes.weights is not that of weight_files; convert the checkpoint again"
        )


def _is_entry(name: str, entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return False
    path, size, digests = PurePosixPath(name), entry["bytes"], entry["sha256"]
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and type(size) is int
        and isinstance(digests, list)
        and len(digests) == -(-size // BLOCK_BYTES)
        and all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests)
    )


@contextmanager
def checked_beside(directory: Path, files: WeightFiles, share: Share | None) -> Iterator[Callable[[], None]]:
    """Check a share of the files while the body reads them; a body that fails for their sake says which one.

    Gives a function that waits for the checks, for a body that must know before it ends.

    Raises:
        DamagedWeights: a file is missing, has another size, or another hash.
    """
    if share is None:
        yield lambda: None
        return
    for name, entry in files.items():
        _check_size(directory / name, entry["bytes"])
    blocks = [(name, n, digest) for name, entry in files.items() for n, digest in enumerate(entry["sha256"])]
    with ThreadPoolExecutor(_num_threads()) as pool:
        checks = [pool.submit(_check, directory, *block) for block in blocks[share.index :: share.count]]
        try:
            yield lambda: _raise_first(checks)
        except DamagedWeights:
            _raise_first(checks)
            raise
        else:
            _raise_first(checks)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _raise_first(checks: list[Future]) -> None:
    for check in checks:
        check.result()


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise DamagedWeights(f"{path}: no such file; copy the checkpoint again")
    if (found := path.stat().st_size) != expected:
        raise DamagedWeights(f"{path}: {found:,} bytes, {expected:,} were written; copy the checkpoint again")


def _check(directory: Path, name: str, number: int, digest: str) -> None:
    if _digest(directory / name, number) != digest:
        at = number * BLOCK_BYTES
        raise DamagedWeights(
            f"{directory / name}: damaged: not what was written, at bytes {at:,} to {at + BLOCK_BYTES:,}; "
            "copy or convert the checkpoint again"
        )


def _digest(path: Path, number: int) -> str:
    sha256, left = hashlib.sha256(), BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(number * BLOCK_BYTES)
        while left and (data := file.read(min(left, _READ_BYTES))):
            sha256.update(data)
            left -= len(data)
    return sha256.hexdigest()


def _num_blocks(path: Path) -> int:
    return -(-path.stat().st_size // BLOCK_BYTES)


def _num_threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))
