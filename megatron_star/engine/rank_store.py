"""One rank's part of a context store: it writes its share of contexts, and reads shares back."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.saved_context import Filler, SavedShare, saved_tensors
from megatron_star.algorithm.star_model import StarModel
from megatron_star.planning.layer_mask import layer_masks
from megatron_star.planning.mask import Range
from megatron_star.store.manifest import MANIFEST, FileRecord, read_manifest
from megatron_star.store.rank_file import RankFile, file_name
from megatron_star.store.reports import ReportedOnce
from megatron_star.store.writer import ContextWriter

MOST_READERS = 4


class Trouble(IntEnum):
    """What came of restoring layers on a rank."""

    NONE = 0
    GONE = 1
    """Another server has dropped the entry meanwhile."""
    UNREADABLE = 2
    """The file system, or this rank's memory, is in trouble."""
    DAMAGED = 3
    """Something of it is not what was written."""


class RankStore:
    """Saves and restores in the order of the driver's commands; made on every rank."""

    def __init__(self, path: Path, star_model: StarModel, tp_rank: int) -> None:
        """path: the store's folder, the same for all ranks."""
        self.path, self.device = path, star_model.device
        config = star_model.model.config
        self._num_layers: int = config.num_layers
        self._filler = Filler(layer_masks(config), config.params_dtype, self._to_device)
        self._cp_rank, self._tp_rank = star_model.exchange.cp_rank, tp_rank
        self._writer = ContextWriter(self._cp_rank, tp_rank, self.device)
        self._opened: dict[EncodedContext, Sequence[SavedShare]] = {}
        self._report = ReportedOnce()

    def save(self, context: EncodedContext, folder: str) -> None:
        """Write this rank's share of a context to the driver's folder of this name; returns at once."""
        self._writer.save(self.path / folder, list(saved_tensors(context, self._num_layers)))

    def restore(self, context: EncodedContext, entry: str, first_layer: int, end_layer: int) -> Trouble:
        """Fill these layers of a context from an entry, instead of encoding them; says what went wrong.

        Layers are numbered from 1, and come in order; after the last one, or a trouble, files are closed.
        """
        try:
            if context not in self._opened:
                self._opened[context] = self._open(entry)
            self._fill(context, range(first_layer, end_layer))
        except FileNotFoundError:
            self.forget(context)
            return Trouble.GONE
        except (OSError, ValueError, RuntimeError) as error:
            self._report(f"{self.path / entry}: not used, encoded anew: {error}")
            self.forget(context)
            return Trouble.DAMAGED if isinstance(error, ValueError) else Trouble.UNREADABLE
        if end_layer > self._num_layers:
            self.forget(context)
        return Trouble.NONE

    def forget(self, context: EncodedContext) -> None:
        """Close the files of a context that is restored, or not wanted any more."""
        self._opened.pop(context, None)

    def close(self) -> None:
        """Wait until all is written."""
        self._writer.close()

    def _open(self, entry: str) -> Sequence[SavedShare]:
        """The shares of all CP ranks; first that of this one, which may be all that it needs."""
        folder = self.path / entry
        manifest = read_manifest(folder / MANIFEST)
        ranks = sorted(range(manifest.cp_size), key=lambda rank: rank != self._cp_rank)
        names = [file_name(rank, self._tp_rank) for rank in ranks]
        pinned = self.device.type == "cuda"
        return [_StoredShare(folder / name, manifest.files[name], pinned) for name in names]

    def _fill(self, context: EncodedContext, layers: range) -> None:
        @torch.inference_mode()
        def fill(layer: int) -> None:
            self._filler.fill(context, layer, self._opened[context])

        with ThreadPoolExecutor(min(MOST_READERS, len(os.sched_getaffinity(0)))) as pool:
            for _ in pool.map(fill, layers):
                pass

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


class _StoredShare:
    """A rank's file, opened when something of it is wanted."""

    def __init__(self, path: Path, record: FileRecord, pinned: bool) -> None:
        self._path, self._record, self._pinned = path, record, pinned

    @cached_property
    def _file(self) -> RankFile:
        return RankFile(self._path, self._record)

    def tokens(self, name: str) -> tuple[Range, ...] | None:
        """See `SavedShare`."""
        return self._file.tokens(name)

    def read(self, name: str) -> Tensor:
        """See `SavedShare`."""
        return self._file.read(name, pinned=self._pinned)
