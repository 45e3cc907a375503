"""From a checkpoint to a model that is ready to encode contexts."""

import torch

from megatron_star.attention.kernels import select_kernel
from megatron_star.inference.decode_weights import choose_sliced_parts, sliceable_weights
from megatron_star.inference.star_model import StarModel
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import CheckpointInfo, load_weights
from megatron_star.model.cpu import lay_out_by_columns
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups


def load_star_model(
    info: CheckpointInfo,
    groups: StarGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    transformer_impl: str = "local",
    decode_weights: str = "auto",
) -> StarModel:
    """Build the checkpoint's model on these groups and load its weights; called on all ranks together.

    Raises:
        ValueError: the kernel or `decode_weights` is unknown, the model is unsupported, or the checkpoint
            does not fit it.
    """
    model = build_gpt_model(
        info.args, groups.model, dtype=dtype, device=device, transformer_impl=transformer_impl
    )
    attention_kernel = select_kernel(kernel, device=device, dtype=dtype, head_size=model.config.kv_channels)
    load_weights(model, info)
    lay_out_for_reading(model)
    exchange = Exchange(groups.cp)
    return StarModel(
        model=model,
        exchange=exchange,
        kernel=attention_kernel,
        vocab_size=info.args["vocab_size"],
        device=device,
        sliced_parts=choose_sliced_parts(decode_weights, model, exchange),
    )


def lay_out_for_reading(model: torch.nn.Module) -> None:
    """Lay weights out as token generation reads them fastest, where that matters: float32 on a CPU."""
    weights = [weight for part in sliceable_weights(model).values() for weight in part]
    if (weights[0].device.type, weights[0].dtype) == ("cpu", torch.float32):
        lay_out_by_columns(weights)
