"""Write safetensors one tensor, or one expert's part of a tensor, at a time, in the memory of it."""

import json
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints_tools.chunks import Shape
from checkpoints_tools.safetensors_header import DTYPES_IN_FILES, INDEX_FILE, SINGLE_FILE, TOOL_KEY

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES_IN_FILES.items()}
_MAX_FILE_BYTES = 5_000_000_000


class Written(NamedTuple):
    """A tensor of a file."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class _Run(NamedTuple):
    """What is not divided over files, and of how many groups it is."""

    tensors: tuple[Written, ...]
    num_groups: int

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def write_hf_weights(
    directory: Path, groups: Sequence[Sequence[Written]], values: Iterable[list[Tensor]]
) -> None:
    """Write `model*.safetensors` and, if there are several, their index.

    Args:
        groups: what will be written, in order. Groups that follow each other and are of one and the same
            tensor hold its parts, one after the other.
        values: the tensors, or parts, of each group, drawn one group at a time.
    """
    files = _divide_over_files(_runs(groups))
    values = iter(values)
    weight_map = {}
    for number, runs in enumerate(files, start=1):
        name = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = [tensor for run in runs for tensor in run.tensors]
        weight_map |= {tensor.name: name for tensor in tensors}
        with (directory / name).open("wb") as file:
            file.write(_header(tensors))
            for run in runs:
                _write_run(file, run, values)
    if len(files) > 1:
        total = sum(run.num_bytes for runs in files for run in runs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _runs(groups: Sequence[Sequence[Written]]) -> list[_Run]:
    runs: list[_Run] = []
    for group in map(tuple, groups):
        if len(group) == 1 and runs and runs[-1].tensors == group:
            runs[-1] = runs[-1]._replace(num_groups=runs[-1].num_groups + 1)
        else:
            runs.append(_Run(group, 1))
    return runs


def _divide_over_files(runs: Sequence[_Run]) -> list[list[_Run]]:
    files: list[list[_Run]] = [[]]
    filled = 0
    for run in runs:
        if files[-1] and filled + run.num_bytes > _MAX_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(run)
        filled += run.num_bytes
    return files


def _write_run(file: object, run: _Run, values: Iterable[list[Tensor]]) -> None:
    num_bytes = 0
    for _ in range(run.num_groups):
        for value in next(values):
            data = value.contiguous().view(-1).view(torch.uint8)
            file.write(memoryview(data.numpy()))
            num_bytes += len(data)
    assert num_bytes == run.num_bytes, (run, num_bytes)


def _header(tensors: Sequence[Written]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", TOOL_KEY: "megatron-star"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
