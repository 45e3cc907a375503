"""An output directory that appears whole or not at all, and replaces nothing but what we have written."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints_tools.written_by_us import what_is_not_ours

_MARGIN = 64_000_000  # bytes for everything that is not a weight


@contextmanager
def new_directory(output: Path, *, inputs: Iterable[Path], force: bool, num_bytes: int) -> Iterator[Path]:
    """A temporary directory beside `output`, synced and renamed to it at the end, or removed on failure.

    Args:
        inputs: what is read: no output may be one of them, be in one of them, or have one in it.

    Raises:
        ValueError: see `check_can_write`; or the disk has no room for `num_bytes`.
    """
    inputs = list(inputs)
    output = check_can_write(output, inputs=inputs, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes + _MARGIN:
        raise ValueError(f"{output.parent}: {free:,} bytes free, {num_bytes + _MARGIN:,} needed")
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        sync(temporary)
        check_can_write(output, inputs=inputs, force=force)  # it may have been there only for an hour
        _replace(output, temporary)
        _sync_one(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(directory: Path) -> None:
    """Have the disk hold a folder with all that is in it, before anything says that it is there."""
    for path in (*directory.rglob("*"), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_can_write(output: Path, *, inputs: Iterable[Path], force: bool) -> Path:
    """The output's absolute path without symbolic links.

    Raises:
        ValueError: `output` is, contains or lies in an input; or it exists, and not `force`, or it is not a
            checkpoint that we have written.
    """
    if output.is_symlink():
        raise ValueError(f"{output} is a symbolic link; give the directory itself")
    resolved = Path(os.path.realpath(output))
    for source in inputs:
        _check_apart(output, resolved, Path(os.path.realpath(source)))
    if not resolved.exists():
        return resolved
    if not force:
        raise ValueError(f"{output} exists; --force replaces it, if it is a checkpoint of ours")
    if reason := what_is_not_ours(resolved):
        raise ValueError(f"{output} exists and is not replaced: {reason}; remove it yourself")
    return resolved


def _check_apart(output: Path, resolved: Path, source: Path) -> None:
    """By identity on the disk, not by name alone: one directory may be mounted in two places."""
    for above, below, relation in ((source, resolved, "lies in"), (resolved, source, "contains")):
        for directory in (below, *below.parents):
            if directory == above or (directory.exists() and above.exists() and directory.samefile(above)):
                relation = "is" if directory == below else relation
                raise ValueError(f"{output} {relation} {source}, which is read")


def _replace(output: Path, temporary: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    output.rename(old / output.name)
    try:
        temporary.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        old.rmdir()
        raise
    shutil.rmtree(old)
