"""The header of a safetensors file, checked.

A file is: 8 bytes, little endian, the length of the header; the header, JSON from name to dtype, shape and
data_offsets, counted from the end of the header; the data. https://github.com/huggingface/safetensors
"""

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.chunks import Shape
from megatron_star.checked_input import shown

DTYPES_IN_FILES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Of quantised tensors and their scales, which are decoded when they are read.
STORED_DTYPES = {
    **DTYPES_IN_FILES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TOOL_KEY = "written_by"  # in the metadata of files that we write
_LARGEST_HEADER = 100_000_000  # bytes, as the format says
_MOST_AXES = 16


class Entry(NamedTuple):
    """Where a tensor lies. `dtype` is the name in the file, which need not be one that we can read."""

    file: Path
    dtype: str
    shape: Shape
    begin: int
    end: int

    def item(self, index: int) -> "Entry":
        """One of those along the first axis."""
        size = (self.end - self.begin) // self.shape[0]
        begin = self.begin + index * size
        return self._replace(shape=self.shape[1:], begin=begin, end=begin + size)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Raises:
        ValueError: it is truncated, or not safetensors.
    """
    header, start = _read_json(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _check_extent(path, list(entries.values()), start, path.stat().st_size)
    return entries


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says about itself; empty if it says nothing, or is not safetensors."""
    try:
        metadata = _read_json(path)[0].get("__metadata__")
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where it ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{path}: truncated, or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file (its header is {shown(header)})")
    return header, 8 + length


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}: {shown(name)} has {what} in the header: not a safetensors file")

    if not isinstance(value, dict):
        raise wrong(shown(value))
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise wrong(f"the dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise wrong(f"the shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"the data_offsets {shown(offsets)}")
    num_bytes = offsets[1] - offsets[0]
    if dtype in STORED_DTYPES and prod(shape) * STORED_DTYPES[dtype].itemsize != num_bytes:
        raise wrong(f"{num_bytes:,} bytes for {dtype} of shape {shown(tuple(shape))}")
    return Entry(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_extent(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """The tensors follow each other from the end of the header to the end of the file."""
    end = max((entry.end for entry in entries), default=start)
    if end > size:
        raise ValueError(f"{path}: truncated at {size} of {end} bytes; download it again")
    at = start
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            raise ValueError(f"{path}: its tensors overlap or leave gaps at byte {at}; download it again")
        at = entry.end
    if at != size:
        raise ValueError(f"{path}: {size - at} bytes belong to no tensor; download it again")
