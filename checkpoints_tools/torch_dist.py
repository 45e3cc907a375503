"""Write and read Megatron's torch_dist weights one piece at a time, through torch.distributed.checkpoint.

Nothing here needs torch.distributed to be initialised, a model, or more memory than a piece takes.
"""

import io
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    save,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoints_tools.chunks import Chunk, Shape, key_of_layer
from checkpoints_tools.families.weight import VOCABULARY
from megatron_star.model.stored_weights import names_of_tensor, read_stored, without_torch_warnings

_QKV_OF = re.compile("linear_qkv|linear_kv_up_proj")  # of the modules beside a core attention
_COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key


def write_weights(
    directory: Path,
    chunks: Sequence[Chunk],
    value_of: Callable[[Chunk], Tensor],
    args: Namespace,
    dtype_of: Callable[[Chunk], torch.dtype],
) -> None:
    """Write the weights as Megatron's `save_checkpoint` would.

    Args:
        chunks: what will be written, in order.
        value_of: the data of a chunk, of its `weight_shape`; called when its turn comes.
        args: what `--use-checkpoint-args` finds.
        dtype_of: the dtype of a chunk's data.
    """
    common_state = {"args": args, "iteration": 0, "checkpoint_version": 3.0}
    objects = {_COMMON_STATE: _serialised([common_state])}
    objects |= dict.fromkeys(_extra_state_keys(chunks), _serialised([None]))
    planner = _LazySavePlanner(chunks, value_of, objects, dtype_of)
    # Copying ahead, which only happens beside a GPU, would reorder the chunks.
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    try:
        with without_torch_warnings():
            save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        cause, _ = error.failures[0]
        raise cause from None
    save_config(CheckpointingConfig("torch_dist"), str(directory))


def _serialised(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer


def _extra_state_keys(chunks: Sequence[Chunk]) -> Iterator[str]:
    """Of every module: TransformerEngine may keep FP8 state in it, and Megatron looks for it in any case."""
    for chunk in chunks:
        module, _, _ = chunk.key.rpartition(".")
        shape, offset = chunk.global_shape[: chunk.num_leading], chunk.offsets[: chunk.num_leading]
        names = [module, _QKV_OF.sub("core_attention", module)]
        for name in names if module.startswith("decoder.") else []:
            yield ShardedObject(f"{name}._extra_state", None, shape or (1,), offset or (0,)).unique_key


class _LazySavePlanner(DefaultSavePlanner):
    """Plans from shapes alone; makes the data of an item when the writer asks for it."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        value_of: Callable[[Chunk], Tensor],
        objects: Mapping[str, io.BytesIO],
        dtype_of: Callable[[Chunk], torch.dtype],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._chunks = {MetadataIndex(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._value_of = value_of
        self._objects = objects
        self._dtype_of = dtype_of

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        tensors = [
            WriteItem(index, WriteItemType.SHARD, tensor_data=self._describe(chunk))
            for index, chunk in self._chunks.items()
        ]
        self.plan = SavePlan(objects + tensors)
        return self.plan

    def _describe(self, chunk: Chunk) -> TensorWriteData:
        return TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)),
            properties=TensorProperties(dtype=self._dtype_of(chunk)),
            size=torch.Size(chunk.global_shape),
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self._objects[write_item.index.fqn]
        chunk = self._chunks[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        value = self._value_of(chunk)
        assert value.dtype == self._dtype_of(chunk), (chunk.key, value.dtype)
        return value.view(chunk.shape)


class MegatronWeights:
    """The tensors of a folder of torch_dist files, whatever parallel sizes wrote them.

    Raises:
        DamagedWeights: torch cannot read what is there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = FileSystemReader(directory)
        self.tensors: dict[str, TensorStorageMetadata] = read_stored(directory, self._read_metadata)

    def _read_metadata(self) -> dict[str, TensorStorageMetadata]:
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        return {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def stored(self, chunk: Chunk) -> tuple[str, TensorStorageMetadata]:
        """The key that the chunk's tensor is stored under, with or without the layer in it, by whatever name.

        Raises:
            ValueError: the checkpoint has no such tensor.
        """
        for key in (chunk.key, key_of_layer(chunk.key, chunk.layer)):
            for name in names_of_tensor(key):
                if name in self.tensors:
                    return name, self.tensors[name]
        raise ValueError(f"{self.directory}: {chunk.key} is not in the checkpoint")

    def check(self, pieces: Iterable[Chunk]) -> list[Chunk]:
        """The pieces, drawn one by one; raises ValueError unless every piece is there, in its shape."""
        checked = []
        for piece in pieces:
            checked.append(piece)
            key, stored = self.stored(piece)
            self._check_size(key, tuple(stored.size), _place(piece, key)[2], piece)
        return checked

    def read(self, chunk: Chunk) -> Tensor:
        """The chunk's data, of its `weight_shape`; of a vocabulary its real tokens only.

        Raises:
            ValueError: it is missing, has another shape, or is not wholly there.
        """
        key, stored = self.stored(chunk)
        offsets, shape, size = _place(chunk, key)
        self._check_size(key, tuple(stored.size), size, chunk)
        out = torch.empty(shape, dtype=stored.properties.dtype)
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [region])
        if sum(prod(item.lengths) for item in items) != out.numel():
            raise ValueError(f"{self.directory}: {key} is not wholly in the checkpoint")
        read_stored(self.directory, lambda: self._reader.read_data(LoadPlan(items), _ReadInto(out)).wait())
        return out.view(-1, *chunk.weight_shape[1:])

    def _check_size(self, key: str, found: Shape, expected: Shape, chunk: Chunk) -> None:
        if chunk.layout == VOCABULARY:  # padded, or not
            rows = chunk.sources[0].shape[0]
            found, expected = (min(found[0], rows), *found[1:]), (rows, *expected[1:])
        if found != expected:
            raise ValueError(f"{self.directory}: {key} has shape {found}, expected {expected}")


def _place(chunk: Chunk, key: str) -> tuple[Shape, Shape, Shape]:
    """Offsets and shape of the chunk's real data, and the whole tensor's shape, as stored under `key`."""
    shape = list(chunk.shape)
    if chunk.layout == VOCABULARY:
        shape[chunk.num_leading] = chunk.sources[0].shape[0]
    skip = 0 if key in names_of_tensor(chunk.key) else 1  # the layer's number is in the key
    return chunk.offsets[skip:], tuple(shape[skip:]), chunk.global_shape[skip:]


class _ReadInto(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        out = self._out
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            out = out.narrow(axis, start, length)
        return out
