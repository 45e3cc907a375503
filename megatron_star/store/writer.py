"""Writes a rank's share of encoded contexts, in a thread of its own, while tokens are generated."""

import os
import queue
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from megatron_star.algorithm.saved_context import SavedTensor
from megatron_star.store.rank_file import file_name, write_rank_file
from megatron_star.store.reports import ReportedOnce

NICENESS = 10
"""On Linux a thread has its own: whoever generates tokens goes first."""


class HostCopier:
    """Copies pieces of a GPU's memory to this machine's, without waiting for what else the GPU does.

    The next copy goes to the same pinned memory: a piece is used before another is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def __call__(self, piece: Tensor) -> Tensor:
        """[..] on the host, contiguous."""
        if self._pinned.numel() < piece.nbytes:
            self._pinned = torch.empty(piece.nbytes, dtype=torch.uint8, pin_memory=True)
        copy = self._pinned[: piece.nbytes].view(piece.dtype).view(piece.shape)
        with torch.cuda.stream(self._stream):
            copy.copy_(piece, non_blocking=True)
        self._stream.synchronize()
        return copy


class ContextWriter:
    """One rank's; `save` returns at once.

    What is handed over must never change any more. Whoever cannot write removes the folder that all ranks
    write to: so the others, and the driver, know that nothing comes of it.
    """

    def __init__(self, cp_rank: int, tp_rank: int, device: torch.device) -> None:
        self.file_name = file_name(cp_rank, tp_rank)
        self._to_host = HostCopier(device) if device.type == "cuda" else Tensor.contiguous
        self._report = ReportedOnce()
        self._jobs: queue.SimpleQueue[tuple[Path, Sequence[SavedTensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="context writer", daemon=True)
        self._thread.start()

    def save(self, folder: Path, tensors: Sequence[SavedTensor]) -> None:
        """Write this rank's file to a folder that an entry is made of."""
        self._jobs.put((folder, tensors))

    def close(self) -> None:
        """Wait until all is written; save no more."""
        self._jobs.put(None)
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while job := self._jobs.get():
            self._write(*job)
            del job  # or its tensors live until the next one comes

    def _write(self, folder: Path, tensors: Sequence[SavedTensor]) -> None:
        try:
            write_rank_file(folder / self.file_name, tensors, self._to_host)
        except Exception as error:
            if folder.exists():  # nobody else has given up before
                why = error.strerror if isinstance(error, OSError) else repr(error)
                self._report(f"{folder.parent}: a context was not stored: {why}", type(error))
                shutil.rmtree(folder, ignore_errors=True)
