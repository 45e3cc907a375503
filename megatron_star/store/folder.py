"""The folder of a context store: entries appear whole or not at all, and go the same way.

    DIR/0123..ef/manifest.json, rank-0-0.safetensors, ..      an entry: its name is a hash of its identity
    DIR/writing-0123..ef-89ab/                                one that is being written
    DIR/dropped-0123..ef-89ab/                                one that is being removed

An entry is written under a temporary name and renamed; it is removed by renaming it first. So any number of
servers may share a folder without locks: one that loses a race encodes a context anew, or writes it in vain.
What has no such name is left alone and not counted. Knows no torch.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import BinaryIO

from megatron_star.store.manifest import MANIFEST, Manifest, read_manifest

ENTRY_NAME = re.compile(r"[0-9a-f]{40}")
_WRITING, _DROPPED = "writing", "dropped"
_LEFTOVER = re.compile(rf"({_WRITING}|{_DROPPED})-[0-9a-f]{{40}}-[0-9a-f]{{8}}")
SECONDS_UNTIL_LEFT_OVER = 3600.0
"""A writer changes its folder all the time: one that has not changed for so long has no writer any more."""
MOST_ENTRIES = 10_000
"""Beyond that, the least recently used go, however small they are."""


@dataclass(frozen=True)
class StoredEntry:
    """One entry as the folder has it: `last_use` in seconds since 1970, `num_bytes` of all its files."""

    name: str
    num_bytes: int
    last_use: float


class ContextFolder:
    """A store's folder, and how much may be in it."""

    def __init__(self, path: str | Path, most_bytes: int) -> None:
        self.path, self.most_bytes = Path(path), most_bytes

    def make(self) -> None:
        """Make it if there is none, for its owner alone; raises OSError naming it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.listdir(self.path)

    @property
    def is_writable(self) -> bool:
        """Whether entries can be written and dropped."""
        return os.access(self.path, os.W_OK | os.X_OK)

    def find(self, name: str) -> Manifest | None:
        """An entry's manifest, or None if there is none; raises OSError or DamagedEntry."""
        try:
            return read_manifest(self.path / name / MANIFEST)
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> None:
        """It was used now; that it cannot be noted does not matter."""
        with suppress(OSError):
            os.utime(self.path / name / MANIFEST)

    def entries(self) -> list[StoredEntry]:
        """All, the least recently used first; raises OSError if the folder cannot be read."""
        found = []
        for item in _folders(self.path):
            if ENTRY_NAME.fullmatch(item.name):
                with suppress(FileNotFoundError):
                    found.append(_entry(item))
        return sorted(found, key=lambda entry: (entry.last_use, entry.name))

    def begin(self, name: str) -> Path:
        """A folder to write an entry's files to, for its owner alone; raises OSError."""
        path = self._temporary(_WRITING, name)
        path.mkdir(mode=0o700)
        return path

    def publish(self, writing: Path, name: str, manifest: Manifest) -> bool:
        """Make an entry of what `begin` began, whose files are on the disk.

        Returns whether it is this one: another server may have written the same meanwhile.

        Raises:
            OSError: it cannot be written; `abandon` it.
        """
        with private_file(writing / MANIFEST) as file:
            file.write(manifest.to_bytes())
        _sync(writing)
        try:
            writing.rename(self.path / name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self.abandon(writing)
            return False
        _sync(self.path)
        return True

    def abandon(self, writing: Path) -> None:
        """Remove what `begin` began; whoever still writes there finds that it is gone."""
        name = writing.name.split("-")[1]
        self._remove(writing, name)

    def drop(self, name: str) -> bool:
        """Remove an entry; returns whether there was one that could be removed."""
        return self._remove(self.path / name, name)

    def make_room(self, num_bytes: int) -> bool:
        """Drop the least recently used until so much more fits; returns whether it does.

        Raises:
            OSError: the folder cannot be read.
        """
        entries = self.entries()
        total, count = sum(entry.num_bytes for entry in entries) + num_bytes, len(entries) + 1
        for entry in entries if num_bytes <= self.most_bytes else ():
            if total <= self.most_bytes and count <= MOST_ENTRIES:
                break
            self.drop(entry.name)
            total, count = total - entry.num_bytes, count - 1
        return total <= self.most_bytes

    def remove_leftovers(self, seconds: float = SECONDS_UNTIL_LEFT_OVER) -> None:
        """Remove what a writer has left that was killed; nothing that changed in the last so many seconds."""
        for item in _folders(self.path):
            if _LEFTOVER.fullmatch(item.name):
                with suppress(OSError):
                    if time() - _last_change(item) > seconds:
                        shutil.rmtree(item.path)

    def _remove(self, path: Path, name: str) -> bool:
        dropped = self._temporary(_DROPPED, name)
        try:
            path.rename(dropped)
        except OSError:
            return False
        shutil.rmtree(dropped, ignore_errors=True)
        return True

    def _temporary(self, what: str, name: str) -> Path:
        return self.path / f"{what}-{name}-{secrets.token_hex(4)}"


@contextmanager
def private_file(path: Path) -> Iterator[BinaryIO]:
    """A new file for its owner alone, for the time of a `with` block; then it is on the disk."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as file:
        yield file
        file.flush()
        os.fsync(descriptor)


def _folders(path: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as items:
        for item in items:
            if item.is_dir(follow_symlinks=False):
                yield item


def _entry(folder: os.DirEntry[str]) -> StoredEntry:
    """One without a manifest is of nobody's use, and the first to go."""
    with os.scandir(folder.path) as items:
        states = {item.name: item.stat(follow_symlinks=False) for item in items}
    last_use = states[MANIFEST].st_mtime if MANIFEST in states else 0.0
    return StoredEntry(folder.name, sum(state.st_size for state in states.values()), last_use)


def _last_change(folder: os.DirEntry[str]) -> float:
    with os.scandir(folder.path) as items:
        changes = [item.stat(follow_symlinks=False).st_mtime for item in items]
    return max([folder.stat(follow_symlinks=False).st_mtime, *changes])


def _sync(folder: Path) -> None:
    """What was renamed or made in it is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
