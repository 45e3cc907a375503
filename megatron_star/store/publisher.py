"""Makes entries of what all ranks have written: on the driver, in a thread of its own, one by one."""

import queue
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from megatron_star.store.folder import ContextFolder
from megatron_star.store.identity import Identity
from megatron_star.store.manifest import Manifest
from megatron_star.store.rank_file import record_of
from megatron_star.store.reports import ReportedOnce

SECONDS_WITHOUT_PROGRESS = 120.0
"""After which a rank is believed to write nothing any more."""
FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.2


@dataclass(frozen=True)
class NewEntry:
    """An entry that ranks are to write.

    Attributes:
        key: of whoever asked for it.
        identity, star: as `Manifest` has them.
        most_bytes: that all files may have together.
    """

    key: int
    name: str
    identity: Identity
    star: dict[str, Any]
    most_bytes: int


class EntryPublisher:
    """`start` an entry; have the ranks write to the folder that is in `ready`; the outcome is in `ended`.

    Attributes:
        ready: names of folders, each to be handed to all ranks once.
        ended: keys of entries, and the bytes that were written; 0 where nothing came of it.
    """

    def __init__(
        self,
        folder: ContextFolder,
        file_names: Collection[str],
        *,
        model: str,
        cp_size: int,
        report: Callable[..., None] | None = None,
    ) -> None:
        """
        Args:
            file_names: that the ranks write.
            model: see `Manifest`.
        """
        self.folder, self._names, self._model, self._cp_size = folder, file_names, model, cp_size
        self._report = report or ReportedOnce()
        self.ready: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._entries: queue.SimpleQueue[NewEntry] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="context publisher", daemon=True).start()

    def start(self, entry: NewEntry) -> None:
        """Returns at once."""
        self._entries.put(entry)

    def _run(self) -> None:
        with suppress(OSError):
            self.folder.remove_leftovers()
        while True:
            entry, num_bytes = self._entries.get(), 0
            try:
                num_bytes = self._published(entry)
            except Exception as error:
                why = error.strerror if isinstance(error, OSError) else repr(error)
                self._report(f"{self.folder.path}: a context was not stored: {why}", type(error))
            self.ended.put((entry.key, num_bytes))

    def _published(self, entry: NewEntry) -> int:
        """Bytes that were written; 0 where another server was faster, or nothing was written."""
        if (self.folder.path / entry.name).exists():
            return 0
        if not self.folder.make_room(entry.most_bytes):
            self._report(
                f"{self.folder.path}: a context of up to {entry.most_bytes:,} bytes was not stored: the "
                f"folder may have {self.folder.most_bytes:,}",
                "too large",
            )
            return 0
        writing = self.folder.begin(entry.name)
        try:
            self.ready.put(writing.name)
            if not self._all_written(writing):
                return 0
            manifest = self._manifest(entry, writing)
            return manifest.num_bytes if self.folder.publish(writing, entry.name, manifest) else 0
        finally:
            self.folder.abandon(writing)  # nothing, once it has been renamed

    def _all_written(self, writing: Path) -> bool:
        """Wait for the ranks; False where one of them has given up, or does nothing any more."""
        pause, seen, since = FIRST_PAUSE, {}, monotonic()
        while True:
            try:
                sizes = {item.name: item.stat().st_size for item in writing.iterdir()}
            except FileNotFoundError:
                if not writing.exists():
                    return False  # a rank has removed it, and said why
                continue  # a file was renamed meanwhile
            if sizes.keys() >= set(self._names):
                return True
            if sizes != seen:
                seen, since = sizes, monotonic()
            elif monotonic() - since > SECONDS_WITHOUT_PROGRESS:
                missing = ", ".join(sorted(set(self._names) - sizes.keys())[:4])
                self._report(f"{writing.parent}: a context was not stored: no {missing} was written", "slow")
                return False
            sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _manifest(self, entry: NewEntry, writing: Path) -> Manifest:
        return Manifest(
            identity=entry.identity,
            star=entry.star,
            cp_size=self._cp_size,
            model=self._model,
            files={name: record_of(writing / name) for name in self._names},
        )
