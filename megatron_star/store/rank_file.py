"""What one rank has of an entry, as a file of safetensors, written and read in pieces.

The file is one that `safetensors` reads. It is written here because that library wants all tensors in memory
at once; and read here because it maps files into memory, where a file that is cut short kills the process.
Beside what the format asks for, the header has the context tokens of each tensor's rows, and its checksum.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_star.algorithm.saved_context import SavedTensor
from megatron_star.planning.mask import Range
from megatron_star.store.folder import private_file
from megatron_star.store.manifest import CHECKSUM_BYTES, DamagedEntry, FileRecord, checksum_of

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES, _ALIGNMENT = 8, 8
MOST_HEADER_BYTES = 100_000_000
"""As the library has it."""
CHUNK_BYTES = 1 << 23
_NO_CHECKSUM = "0" * 2 * CHECKSUM_BYTES

ToHost = Callable[[Tensor], Tensor]


class Abandoned(Exception):
    """Nobody wants the file any more."""


def file_name(cp_rank: int, tp_rank: int) -> str:
    """Of a rank's file in an entry."""
    return f"rank-{cp_rank}-{tp_rank}.safetensors"


def write_rank_file(
    path: Path,
    tensors: Iterable[SavedTensor],
    to_host: ToHost = Tensor.contiguous,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the file under another name, and rename it once it is on the disk.

    Args:
        to_host: a copy of a piece in this machine's memory, contiguous.
        check: called now and then; what it raises ends the writing.

    Raises:
        OSError: it cannot be written, or its folder is gone.
    """
    tensors, partial = list(tensors), path.with_suffix(".part")
    checksums = {tensor.name: _NO_CHECKSUM for tensor in tensors}
    with private_file(partial) as file:
        file.write(_header(tensors, checksums))
        for tensor in tensors:
            digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
            for chunk in _chunks(tensor.tensor, to_host):
                check()
                digest.update(chunk)
                file.write(chunk)
            checksums[tensor.name] = digest.hexdigest()
        file.seek(0)
        file.write(_header(tensors, checksums))
    partial.rename(path)


def _header(tensors: list[SavedTensor], checksums: Mapping[str, str]) -> bytes:
    """As long whatever the checksums are. Ranges that many tensors share are there once."""
    tokens = list(dict.fromkeys(tensor.tokens for tensor in tensors))
    indices = {tensor.name: tokens.index(tensor.tokens) for tensor in tensors}
    metadata = {"tokens": tokens, "tokens_of": indices, "checksums": dict(checksums)}
    fields: dict[str, Any] = {"__metadata__": {name: json.dumps(value) for name, value in metadata.items()}}
    offset = 0
    for name, _, tensor in tensors:
        end = offset + tensor.nbytes
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _chunks(tensor: Tensor, to_host: ToHost) -> Iterator[memoryview]:
    num_rows = max(1, CHUNK_BYTES // max(1, tensor[:1].nbytes))
    for rows in tensor.split(num_rows):
        if rows.numel():
            yield memoryview(to_host(rows).reshape(-1).view(torch.uint8).numpy())


def record_of(path: Path) -> FileRecord:
    """Of a file that was written just now; raises OSError."""
    with path.open("rb") as file:
        return FileRecord(os.fstat(file.fileno()).st_size, checksum_of(_read_header(file, path)))


class _Place(NamedTuple):
    dtype: torch.dtype
    shape: list[int]
    start: int
    end: int


class RankFile:
    """A rank's file, open for reading: what it has, and its tensors, each compared with its checksum.

    Any number of threads may read; `close` it.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        """
        Raises:
            OSError: it cannot be read; FileNotFoundError where it is gone.
            DamagedEntry: it is not what was written.
        """
        self.path, self._file = path, path.open("rb", buffering=0)
        try:
            self._read_places(record)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Read no more."""
        self._file.close()

    def tokens(self, name: str) -> tuple[Range, ...] | None:
        """The context tokens of a tensor's rows; None if it is not in here."""
        return self._tokens[self._tokens_of[name]] if name in self._places else None

    def read(self, name: str, *, pinned: bool = False) -> Tensor:
        """A tensor that `tokens` knows, in memory of its own; raises OSError or DamagedEntry.

        pinned: so that it can be copied to a GPU at the rate of its link.
        """
        place = self._places[name]
        content = torch.empty(place.end - place.start, dtype=torch.uint8, pin_memory=pinned)
        if content.numel():
            self._read_into(memoryview(content.numpy()), place.start, name)
        if checksum_of(memoryview(content.numpy())) != self._checksums[name]:
            raise DamagedEntry(f"{self.path}: damaged: {name} is not what was written")
        return content.view(place.dtype).view(place.shape)

    def _read_into(self, memory: memoryview, start: int, name: str) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(self._file.fileno(), [memory[done : done + CHUNK_BYTES]], start + done)
            if not count:
                raise DamagedEntry(f"{self.path}: cut short in {name}")
            done += count

    def _read_places(self, record: FileRecord) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size != record.num_bytes:
            raise DamagedEntry(f"{self.path}: {size:,} bytes, {record.num_bytes:,} were written")
        header = _read_header(self._file, self.path)
        if checksum_of(header) != record.header:
            raise DamagedEntry(f"{self.path}: damaged: its header is not what was written")
        fields = json.loads(header[_LENGTH_BYTES:])
        metadata = {name: json.loads(text) for name, text in fields.pop("__metadata__").items()}
        self._tokens = [tuple(Range(*each) for each in ranges) for ranges in metadata["tokens"]]
        self._tokens_of, self._checksums = metadata["tokens_of"], metadata["checksums"]
        self._places = {
            name: _Place(DTYPES[field["dtype"]], field["shape"], *(len(header) + n for n in offsets))
            for name, field in fields.items()
            for offsets in [field["data_offsets"]]
        }


def _read_header(file: BinaryIO, path: Path) -> bytes:
    """With its length in front; raises OSError or DamagedEntry."""
    length = file.read(_LENGTH_BYTES)
    num_bytes = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or num_bytes > MOST_HEADER_BYTES:
        raise DamagedEntry(f"{path}: damaged: no header of safetensors")
    header = file.read(num_bytes)
    if len(header) < num_bytes:
        raise DamagedEntry(f"{path}: cut short in its header")
    return length + header
