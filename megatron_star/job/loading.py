"""From a checkpoint to a model that is ready to encode contexts."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.partial import AttentionKernel
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import CheckpointInfo
from megatron_star.model.cpu import lay_out
from megatron_star.model.stored_weights import load_weights
from megatron_star.model.weight_hashes import WHOLE, Share
from megatron_star.parallel.control import SharedError, gather_integers, on_every_rank
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups
from megatron_star.speed.compiled_layers import check_can_be_compiled, compile_layers
from megatron_star.speed.decode_weights import (
    check_decode_weights,
    choose_sliced_parts,
    sliceable_weights,
)
from megatron_star.speed.processor import IS_AMD
from megatron_star.speed.sliced_linear import NO_PARTS, SummedLinear


def load_star_model(
    info: CheckpointInfo,
    groups: StarGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    transformer_impl: str = "local",
    decode_weights: str = "auto",
    compiled_rows: Sequence[int] = (),
    verify_weights: Share | None = WHOLE,
) -> StarModel:
    """Build the checkpoint's model on these groups and load its weights; called on all ranks together.

    What may fail on one rank alone is agreed on before the next exchange between ranks: none waits for one
    that never comes.

    Args:
        compiled_rows: numbers of sequences, of one token each, for which layers are compiled.
        verify_weights: see `load_weights`.

    Raises:
        SharedError: on all ranks: the kernel or `decode_weights` is unknown, the model is unsupported, the
            checkpoint does not fit it, its layers cannot be compiled, or the ranks of a CP group have read
            different weights.
    """

    def build_and_load() -> tuple[Any, AttentionKernel]:
        check_decode_weights(decode_weights)
        model = build_gpt_model(
            info.args, groups.model, dtype=dtype, device=device, transformer_impl=transformer_impl
        )
        head_size = model.config.kv_channels
        attention_kernel = select_kernel(kernel, device=device, dtype=dtype, head_size=head_size)
        if compiled_rows:
            check_can_be_compiled(model, compiled_rows)  # before weights are read, which may take minutes
        load_weights(model, info, verify=verify_weights)
        lay_out_for_reading(model)  # as whole weights, whose reading `choose_sliced_parts` measures
        return model, attention_kernel

    model, attention_kernel = on_every_rank(build_and_load, groups.control)
    check_same_weights(model, groups)
    exchange = Exchange(groups.cp)
    exchange.open(device)
    sliced_parts = choose_sliced_parts(decode_weights, model, exchange)
    lay_out_for_reading(model, sliced_parts)
    star_model = StarModel(
        model=model,
        exchange=exchange,
        kernel=attention_kernel,
        vocab_size=info.args["vocab_size"],
        device=device,
        sliced_parts=sliced_parts,
    )
    return on_every_rank(lambda: compile_layers(star_model, compiled_rows), groups.control)


def check_same_weights(model: torch.nn.Module, groups: StarGroups) -> None:
    """Raises SharedError on all ranks unless those with the same part of the model have the same weights."""
    sums = gather_integers(sum_of_weights(model), groups.control)
    tp_size = groups.model.tp.size()
    for rank, value in enumerate(sums):
        if value != sums[rank % tp_size]:
            raise SharedError(
                f"rank {rank} has read other weights than rank {rank % tp_size}: is the checkpoint the same "
                "on all nodes?"
            )


@torch.no_grad()
def sum_of_weights(model: torch.nn.Module) -> int:
    """63 bits of a hash of each parameter's sum of integers: as fast as memory is read."""
    sums = [(name, _sum_of_bits(weight)) for name, weight in sorted(model.named_parameters())]
    return int.from_bytes(hashlib.sha256(repr(sums).encode()).digest()[:8]) >> 1


def _sum_of_bits(weight: torch.Tensor) -> int:
    """Whatever the order in memory, which may differ between ranks."""
    in_order = weight.t() if weight.dim() == 2 and not weight.is_contiguous() else weight
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(in_order.contiguous().view(integers).sum(dtype=torch.int64))


def lay_out_for_reading(model: Any, sliced_parts: frozenset[str] = NO_PARTS) -> None:
    """Lay weights out as token generation reads them fastest, where that matters: float32 on a CPU.

    A slice lies in one piece, except on a processor of AMD, where by columns (`lay_out`) matters more.
    """
    layers = [layer for of_part in model.weight_slicing.layers.values() for layer in of_part]
    sliced_by_rows = {id(layer.weight) for layer in layers if isinstance(layer, SummedLinear)}
    for part, weights in sliceable_weights(model).items():
        if (weights[0].device.type, weights[0].dtype) != ("cpu", torch.float32):
            continue
        for weight in weights:
            if part in sliced_parts and not IS_AMD:
                by_columns = id(weight) in sliced_by_rows
            else:
                by_columns = weight.size(0) >= weight.size(1)
            lay_out(weight, by_columns=by_columns)
