"""A context store as the driver sees it: what is in it, what is written to it, and when.

A context that a request needs is looked up before it is encoded; one that was encoded is written when all of
it is there, in the background, and kept in memory until then. Both are the scheduler's to carry out: it tells
all ranks, and all ranks do the same.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_star.config import StarConfig
from megatron_star.engine.cached_context import CachedContext
from megatron_star.engine.rank_store import Trouble
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.planner import Planner
from megatron_star.store.folder import ContextFolder
from megatron_star.store.identity import Identity, context_identity, entry_name
from megatron_star.store.manifest import DamagedEntry, Manifest
from megatron_star.store.publisher import EntryPublisher, NewEntry
from megatron_star.store.rank_file import file_name
from megatron_star.store.reports import ReportedOnce

LEAST_TOKENS = 256
"""Of a context that is worth a folder: fewer are encoded as soon as they are read."""
MOST_HELD_SHARE = 0.25
"""Of the budget: contexts that wait to be written are not dropped, as long as they are no more than that."""
BYTES_OF_A_HEADER = 1 << 20
"""Of a file, besides its tensors."""


@dataclass
class StoreCounts:
    """Since the start: contexts that were restored, not found, found and not usable, and written."""

    restored: int = 0
    missed: int = 0
    unusable: int = 0
    written: int = 0
    bytes_written: int = 0

    def to_json(self) -> dict[str, int]:
        """By name."""
        return {row.name: getattr(self, row.name) for row in fields(self)}


class ContextStore:
    """Looks contexts up, and has them written; lives on the driver, in the engine's thread."""

    def __init__(
        self,
        folder: ContextFolder,
        facts: Mapping[str, str | int],
        *,
        model: str,
        cp_size: int,
        tp_size: int,
        least_tokens: int = LEAST_TOKENS,
    ) -> None:
        """
        Args:
            facts: what must be equal besides tokens and mask: see `context_identity`.
            model: the name of the checkpoint, for people.
            least_tokens: contexts with fewer are neither looked up nor written.
        """
        self.folder, self.facts, self.least_tokens = folder, {**facts, "tp_size": tp_size}, least_tokens
        self.cp_size, self.tp_size = cp_size, tp_size
        self.counts, self._writes = StoreCounts(), folder.is_writable
        self._report = ReportedOnce()
        names = self._file_names(cp_size)
        self._publisher = EntryPublisher(folder, names, model=model, cp_size=cp_size, report=self._report)
        self._looked_up: CachedContext | None = None
        self._not_usable: set[str] = set()
        self._waiting: deque[CachedContext] = deque()
        self._held: dict[int, CachedContext] = {}
        self._written: CachedContext | None = None

    @property
    def is_busy(self) -> bool:
        """Something is being written, or waits for it."""
        return bool(self._waiting or self._written)

    def look_up(self, scheduler: Scheduler, planner: Planner) -> bool:
        """Whether the context that is encoded next is read from the store instead; looks it up once.

        Then it is divided over the ranks as it was when it was written, if they are as many and have room.
        """
        context = scheduler.next_to_encode
        if context and context is not self._looked_up and not context.opened and self._is_worth_it(context):
            self._looked_up = context
            if manifest := self._usable(context):
                context.entry = entry_name(manifest.identity)
                self.folder.touch(context.entry)
                if manifest.cp_size == self.cp_size:
                    scheduler.recut_next(lambda context: _as_written(context, manifest, planner))
        return bool(context and context.entry)

    def note_restored(
        self, scheduler: Scheduler, context: CachedContext, end_layer: int, trouble: Trouble
    ) -> None:
        """All ranks have read a context's layers before `end_layer`; or one could not, and said why."""
        if trouble == Trouble.NONE:
            scheduler.note_restored(context, end_layer)
            self.counts.restored += context.encoded
            return
        if trouble != Trouble.GONE:
            self._not_usable.add(context.entry)
            self.counts.unusable += 1
        if trouble == Trouble.DAMAGED:
            self.folder.drop(context.entry)
        scheduler.encode_anew(context)

    def next_saves(self, scheduler: Scheduler, encoding: CachedContext | None) -> list[tuple[int, str]]:
        """What ranks are told to write in this turn: ids of contexts, and folders; called in each turn.

        encoding: whose wave, or layers, they are told to run before that.
        """
        if encoding and encoding.encoded:
            self._note_encoded(scheduler, encoding)
        while not self._publisher.ended.empty():
            _, num_bytes = self._publisher.ended.get()
            self.counts.written += bool(num_bytes)
            self.counts.bytes_written += num_bytes
            self._let_go(scheduler, self._written)
            self._written = None
        if not self._written:
            self._start_next(scheduler)
        if self._publisher.ready.empty():
            return []
        return [(self._written.id, self._publisher.ready.get())]

    def _note_encoded(self, scheduler: Scheduler, context: CachedContext) -> None:
        """Its last wave goes through the model: it is to be written."""
        if not (self._writes and self._is_worth_it(context)):
            return
        self._waiting.append(context)
        held = sum(max(context.bytes_per_rank) for context in self._held.values())
        if held + max(context.bytes_per_rank) <= MOST_HELD_SHARE * scheduler.memory.budget:
            self._hold(scheduler, context)

    def _start_next(self, scheduler: Scheduler) -> None:
        while self._waiting:
            context = self._waiting.popleft()
            if scheduler.contexts.get(context.key) is context:
                self._hold(scheduler, context)
                self._written = context
                self._publisher.start(self._new_entry(context))
                return

    def _new_entry(self, context: CachedContext) -> NewEntry:
        identity = self._identity(context)
        most_bytes = self.tp_size * sum(size + BYTES_OF_A_HEADER for size in context.bytes_per_rank)
        return NewEntry(context.id, entry_name(identity), identity, asdict(context.star), most_bytes)

    def _hold(self, scheduler: Scheduler, context: CachedContext) -> None:
        if context.id not in self._held:
            self._held[context.id] = context
            scheduler.hold(context)

    def _let_go(self, scheduler: Scheduler, context: CachedContext) -> None:
        del self._held[context.id]
        scheduler.let_go(context)

    def _is_worth_it(self, context: CachedContext) -> bool:
        num_tokens = context.plan.num_tokens - context.plan.start
        return num_tokens >= self.least_tokens and context.scoring is None

    def _usable(self, context: CachedContext) -> Manifest | None:
        """The manifest of a context's entry, if there is one and it can be used."""
        identity = self._identity(context)
        name = entry_name(identity)
        try:
            manifest = None if name in self._not_usable else self.folder.find(name)
            if manifest and manifest.identity != identity:
                raise DamagedEntry(f"{self.folder.path / name}: it is of another context")
            if manifest and set(manifest.files) != set(self._file_names(manifest.cp_size)):
                raise DamagedEntry(f"{self.folder.path / name}: it has not the files of all ranks")
        except (OSError, DamagedEntry) as error:
            self._report(f"not used, encoded anew: {error}")
            self._not_usable.add(name)
            self.counts.unusable += 1
            if isinstance(error, DamagedEntry):
                self.folder.drop(name)
            return None
        self.counts.missed += manifest is None
        return manifest

    def _identity(self, context: CachedContext) -> Identity:
        tokens, mask = context.key
        return context_identity(self.facts, tokens, mask, context.plan.start, context.plan.num_tokens)

    def _file_names(self, cp_size: int) -> Collection[str]:
        return [file_name(cp, tp) for cp in range(cp_size) for tp in range(self.tp_size)]


def _as_written(context: CachedContext, manifest: Manifest, planner: Planner) -> Any:
    """The configuration and the plan that the context was written with."""
    waves = StarConfig.from_dict(manifest.star).wave_tokens
    star = replace(context.star, wave_tokens=waves)
    return star, planner.of_turns(context.edges, star, context.base_plan)
