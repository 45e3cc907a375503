"""The stored weights of a checkpoint, into a model: each rank reads its own part."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_star.model.checkpoint import CheckpointInfo, weights_directory
from megatron_star.model.weight_hashes import WHOLE, DamagedWeights, Share, checked_beside

# A norm is a module of its own, or belongs to the projection after it. Checkpoints, which are made with
# TransformerEngine's layers, have the first before experts, else the second. Megatron's local layers have the
# first only with latent attention, and there for all norms.
_NAMES_OF_NORMS = (
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)


@torch.no_grad()
def load_weights(model: torch.nn.Module, info: CheckpointInfo, *, verify: Share | None = WHOLE) -> None:
    """Read the weights into the model's parameters, in place, each rank its own part.

    Any tensor-parallel size, device and parameter dtype; needs `torch.distributed` but communicates nothing.

    Args:
        verify: which blocks of the files this rank compares with their hashes, where those are known, while
            it reads; None for no comparison.

    Raises:
        ValueError: a tensor is missing from the checkpoint or from the model, or its shape differs; a file is
            damaged; or a value is not a number in the dtype of the parameters.
    """
    weights = weights_directory(info.directory)
    with checked_beside(info.directory, info.weight_files, verify):
        strategy = TorchDistLoadShardedStrategy()
        stored = read_stored(weights, lambda: strategy.load_tensors_metadata(weights))
        wanted = _sharded_tensors(model, stored)
        _check_same_tensors(wanted, stored, info)
        for tensor in wanted:
            if tensor.allow_shape_mismatch:
                tensor.data.zero_()  # rows of padding, which may not be stored
        read_stored(
            weights, lambda: strategy.load({str(i): tensor for i, tensor in enumerate(wanted)}, weights)
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not has_only_numbers(tensor):
            raise DamagedWeights(
                f"{info.directory}: {name} holds values that are not finite numbers in {tensor.dtype}"
            )


def read_stored(weights: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns, which reads torch_dist files of the folder `weights`.

    Raises:
        DamagedWeights: it fails, with whatever torch makes of files that are not whole.
    """
    try:
        with without_torch_warnings():
            return read()
    except (Exception, CheckpointException) as error:
        cause = error.failures[0][0] if isinstance(error, CheckpointException) else error
        raise DamagedWeights(f"{weights}: cannot be read ({type(cause).__name__}: {cause})") from error


@contextmanager
def without_torch_warnings() -> Iterator[None]:
    """For calls of torch.distributed.checkpoint, which warns about what its callers inside torch do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


def has_only_numbers(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; in one pass, without a tensor of flags."""
    return not tensor.numel() or all(bound.isfinite().item() for bound in tensor.detach().aminmax())


def _sharded_tensors(model: torch.nn.Module, stored: Mapping[str, ShardedTensor]) -> list[ShardedTensor]:
    """This rank's parameters as views, each with its key and place in the checkpoint."""
    stacked = any(key.startswith("decoder.layers.self_attention") for key in stored)
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked})
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    for tensor in tensors:
        tensor.key = _stored_key(tensor.key, stored)
    return tensors


def names_of_tensor(key: str) -> Iterator[str]:
    """The key, then what another of Megatron's specifications of layers calls the same tensor."""
    yield key
    for names in _NAMES_OF_NORMS:
        for name, other in (names, names[::-1]):
            if name in key:
                yield key.replace(name, other)


def _stored_key(key: str, stored: Mapping[str, ShardedTensor]) -> str:
    """The first of its names that the checkpoint has; its own if none."""
    return next((name for name in names_of_tensor(key) if name in stored), key)


def _check_same_tensors(
    wanted: list[ShardedTensor], stored: Mapping[str, ShardedTensor], info: CheckpointInfo
) -> None:
    where = info.directory
    keys = {tensor.key for tensor in wanted}
    if missing := sorted(keys - stored.keys()):
        raise ValueError(f"{where}: {missing[0]} is not in the checkpoint ({len(missing)} keys missing)")
    unexpected = sorted(key for key in stored.keys() - keys if not key.startswith("optimizer."))
    if unexpected:
        raise ValueError(f"{where}: {unexpected[0]} is not in the model ({len(unexpected)} such keys)")
    for tensor in wanted:
        found, expected = tuple(stored[tensor.key].global_shape), tuple(tensor.global_shape)
        if tensor.allow_shape_mismatch:
            found, expected = _without_padding(found, info), _without_padding(expected, info)
        if found != expected:
            raise ValueError(f"{where}: {tensor.key} has shape {found}, the model needs {expected}")


def _without_padding(shape: tuple[int, ...], info: CheckpointInfo) -> tuple[int, ...]:
    """A vocabulary may be padded to any length: its real tokens are what must agree."""
    return (min(shape[0], info.args["vocab_size"]), *shape[1:])
