"""From a checkpoint to a model that is ready to encode contexts."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_star.attention.kernels import select_kernel
from megatron_star.inference.compiled_layers import check_can_be_compiled, compile_layers
from megatron_star.inference.decode_weights import choose_sliced_parts, sliceable_weights
from megatron_star.inference.star_model import StarModel
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import WHOLE, CheckpointInfo, load_weights
from megatron_star.model.cpu import lay_out
from megatron_star.model.sliced_linear import NO_PARTS, SummedLinear
from megatron_star.model.weight_hashes import Share
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups
from megatron_star.processor import IS_AMD


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

    Args:
        compiled_rows: numbers of sequences, of one token each, for which layers are compiled.
        verify_weights: see `load_weights`.

    Raises:
        ValueError: the kernel or `decode_weights` is unknown, the model is unsupported, the checkpoint does
            not fit it, or its layers cannot be compiled.
    """
    model = build_gpt_model(
        info.args, groups.model, dtype=dtype, device=device, transformer_impl=transformer_impl
    )
    attention_kernel = select_kernel(kernel, device=device, dtype=dtype, head_size=model.config.kv_channels)
    if compiled_rows:
        check_can_be_compiled(model, compiled_rows)  # before weights are read, which may take minutes
    load_weights(model, info, verify=verify_weights)
    lay_out_for_reading(model)  # as whole weights, whose reading `choose_sliced_parts` measures
    exchange = Exchange(groups.cp)
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
    return compile_layers(star_model, compiled_rows)


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
