"""Read and write safetensors one tensor at a time, so that memory is that of a tensor, not of a file.

A file is: 8 bytes, little endian, the length of the header; the header, JSON from name to dtype, shape and
data_offsets, counted from the end of the header; the data. https://github.com/huggingface/safetensors
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints_tools.families import HfTensor, Shape

DTYPES_IN_FILES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES_IN_FILES.items()}
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_MAX_FILE_BYTES = 5_000_000_000


class Entry(NamedTuple):
    """Where a tensor lies. `dtype` is the name in the file, which need not be one that we can read."""

    file: Path
    dtype: str
    shape: Shape
    begin: int
    end: int


class HfWeights:
    """The tensors of a Hugging Face directory. Opening it reads headers only.

    Raises:
        FileNotFoundError: no safetensors, or a file that the index lists is missing.
        ValueError: a file is truncated or not safetensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        for file in _weight_files(directory):
            self.entries |= _read_header(file)

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        entry = self.entries[name]
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            _read_into(file, memoryview(data.numpy()), entry.file)
        return data.view(DTYPES_IN_FILES[entry.dtype]).view(entry.shape)


def _read_into(file: object, buffer: memoryview, path: Path) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{path}: the file ends too early; download it again")
        buffer = buffer[count:]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / name for name in names]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file, but {index.name} lists it; download it again")
        return files
    if (directory / _SINGLE_FILE).is_file():
        return [directory / _SINGLE_FILE]
    if legacy := sorted(directory.glob("pytorch_model*.bin")) + sorted(directory.glob("consolidated*.pth")):
        raise FileNotFoundError(
            f"{legacy[0]}: only safetensors are read; save the model as safetensors first"
        )
    raise FileNotFoundError(f"{directory}: neither {_SINGLE_FILE} nor {_INDEX_FILE} in it")


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated, or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: not a safetensors file (its header is not JSON)") from error
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        entries[name] = Entry(path, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
    end = max((entry.end for entry in entries.values()), default=start)
    if end > size:
        raise ValueError(f"{path}: truncated at {size} of {end} bytes; download it again")
    return entries


def write_hf_weights(
    directory: Path, groups: Sequence[Sequence[HfTensor]], values: Iterable[list[Tensor]], dtype: torch.dtype
) -> None:
    """Write `model*.safetensors` and, if there are several, their index.

    Args:
        groups: what will be written, in order; a group is never divided over files.
        values: the tensors of each group, drawn one group at a time.
        dtype: of all tensors.
    """
    files = _divide_over_files(groups, dtype)
    values = iter(values)
    weight_map = {}
    for number, groups_of_file in enumerate(files, start=1):
        name = _SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = [tensor for group in groups_of_file for tensor in group]
        weight_map |= {tensor.name: name for tensor in tensors}
        with (directory / name).open("wb") as file:
            file.write(_header(tensors, dtype))
            for _ in groups_of_file:
                for value in next(values):
                    file.write(memoryview(value.contiguous().view(-1).view(torch.uint8).numpy()))
            os.fsync(file.fileno())
    if len(files) > 1:
        total = sum(_num_bytes(group, dtype) for group in groups)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _divide_over_files(groups: Sequence[Sequence[HfTensor]], dtype: torch.dtype) -> list[list]:
    files: list[list] = [[]]
    filled = 0
    for group in groups:
        size = _num_bytes(group, dtype)
        if files[-1] and filled + size > _MAX_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(group)
        filled += size
    return files


def _num_bytes(group: Sequence[HfTensor], dtype: torch.dtype) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in group) * dtype.itemsize


def _header(tensors: Sequence[HfTensor], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + _num_bytes([tensor], dtype)
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
