"""Read safetensors one tensor at a time, so that memory is that of a tensor, not of a file."""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.chunks import HfTensor, Shape, Slab
from checkpoints_tools.multimodal import Surroundings
from checkpoints_tools.quantisation import Quantisation
from checkpoints_tools.quantised_tensor import QuantisedTensor, find_quantised
from checkpoints_tools.safetensors_header import INDEX_FILE, SINGLE_FILE, STORED_DTYPES, Entry, read_header
from megatron_star.checked_input import read_json_object, shown

_ADAPTER_FILE = "adapter_config.json"
_LONGEST_NAME = 255  # characters of a file's name


class HfWeights:
    """The tensors of a Hugging Face directory, of the files that transformers reads. Opening reads headers.

    Args:
        quantisation: what config.json says of it. Quantised tensors are decoded when they are read.
        surroundings: of a language model inside a multimodal one, whose tensors get the names of it alone.

    Attributes:
        taken: stored tensors that others are made of.
        quantised: by the names of what they are decoded to.
        left_out: what is no part of the language model.

    Raises:
        FileNotFoundError: no safetensors, or a file that the index lists is missing.
        ValueError: a file is truncated or not safetensors, or a tensor is in two files.
    """

    def __init__(
        self,
        directory: Path,
        quantisation: Quantisation | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        self.taken: set[str] = set()
        self.quantised: dict[str, QuantisedTensor] = {}
        self.left_out: dict[str, Entry] = {}
        self._quantisation = quantisation
        self._surroundings = surroundings
        for file in _weight_files(directory):
            entries = self._of_language_model(read_header(file))
            if twice := self.entries.keys() & entries.keys():
                raise ValueError(f"{file}: {min(twice)} is in {self.entries[min(twice)].file} as well")
            self.entries |= entries

    def _of_language_model(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        if self._surroundings is None:
            return entries
        found = {}
        for name, entry in entries.items():
            alone = self._surroundings.name_alone(name)
            if alone is None:
                self.left_out[name] = entry
            elif alone in found:
                raise ValueError(f"{entry.file}: {alone} is in it twice, under {name} and another name")
            else:
                found[alone] = entry
        return found

    def take(self, tensor: HfTensor) -> Entry | None:
        """Where the tensor lies, under its own name from now on; None if it is not there.

        Raises:
            ValueError: it is a piece of another that has not the right shape, or its scales do not fit.
        """
        if found := self._find_quantised(tensor):
            self.quantised[tensor.name] = found
            self.taken |= found.names
            self.entries[tensor.name] = found.values._replace(
                dtype=found.quantisation.format, shape=found.shape
            )
        slab = tensor.elsewhere
        if tensor.name not in self.entries and slab and slab.name in self.entries:
            whole = self.entries[slab.name]
            _check_shape(whole.file, slab, whole.shape)
            num_bytes = whole.end - whole.begin
            begin, size = (n * num_bytes // prod(slab.shape) for n in (slab.begin, prod(tensor.shape)))
            self.entries[tensor.name] = whole._replace(
                shape=tensor.shape, begin=whole.begin + begin, end=whole.begin + begin + size
            )
            self.taken.add(slab.name)
        return self.entries.get(tensor.name)

    def _find_quantised(self, tensor: HfTensor) -> QuantisedTensor | None:
        """By its own name, or as an expert's of the tensor of all experts."""
        quantisation, slab = self._quantisation, tensor.elsewhere
        if quantisation is None:
            return None
        found = find_quantised(self.entries, tensor.name, quantisation)
        if found or slab is None or slab.shape[1:] != tensor.shape:
            return found
        whole = find_quantised(self.entries, slab.name, quantisation)
        if whole is None:
            return None
        _check_shape(whole.values.file, slab, whole.shape)
        return whole.item(slab.begin // prod(tensor.shape))

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        if name in self.quantised:
            return self.quantised[name].decode(_read)
        return _read(self.entries[name])


def _check_shape(file: Path, slab: Slab, found: Shape) -> None:
    if found != slab.shape:
        raise ValueError(f"{file}: {slab.name} has shape {found}, config.json says {slab.shape}")


def _read(entry: Entry) -> Tensor:
    data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        _read_into(file, memoryview(data.numpy()), entry.file)
    return data.view(STORED_DTYPES[entry.dtype]).view(entry.shape)


def _read_into(file: object, buffer: memoryview, path: Path) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{path}: the file ends too early; download it again")
        buffer = buffer[count:]


def _weight_files(directory: Path) -> list[Path]:
    """As transformers chooses: the single file comes before the index."""
    if (directory / _ADAPTER_FILE).is_file():
        raise ValueError(f"{directory / _ADAPTER_FILE}: an adapter; merge it into its model first")
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        return _files_of_index(directory / INDEX_FILE)
    if legacy := sorted(directory.glob("pytorch_model*.bin")) + sorted(directory.glob("consolidated*.pth")):
        raise FileNotFoundError(
            f"{legacy[0]}: only safetensors are read; save the model as safetensors first"
        )
    raise FileNotFoundError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} in it")


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map={shown(weight_map)}: it must be from tensors to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > _LONGEST_NAME:
            raise ValueError(f"{index}: weight_map has {shown(name)}, which is not the name of a file")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but {index.name} lists it; download it again")
    return files
