"""How a context's keys and values are stored: chosen once, by name, when a model is set up."""

import importlib

import torch

from megatron_star.attention import quantised_cpu
from megatron_star.attention.quantised_kv import QuantisedFormat
from megatron_star.attention.stored_kv import AS_COMPUTED, KvFormat
from megatron_star.config import KV_DTYPES

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
HAS_FLOAT8 = (8, 9)
"""Compute capability of GPUs with instructions for float8; elsewhere it is widened by torch."""


def kv_format(
    name: str,
    *,
    device: torch.device,
    head_size: int | None,
    softcap: float | None = None,
) -> KvFormat:
    """The format of this name, of `KV_DTYPES`; `auto` stores what was computed.

    Args:
        head_size: of keys and values; None for latents, which are not quantised.
        softcap: of the scores; with one, keys and values are read back for the kernel that has it.

    Raises:
        ValueError: the name is none of them, or the model has latent attention.
    """
    if name not in KV_DTYPES:
        raise ValueError(f"unknown dtype of KV {name!r}: it must be one of {', '.join(KV_DTYPES)}")
    if name == "auto":
        return AS_COMPUTED
    if head_size is None:
        raise ValueError(
            f"kv-dtype is {name!r}: it must be 'auto' for a model with multi-head latent attention, whose "
            "latents are kept as they are computed"
        )
    dtype = DTYPES[name]
    if softcap is not None:
        return QuantisedFormat(name, dtype)
    if device.type == "cuda":
        if dtype != torch.int8 and torch.cuda.get_device_capability(device) < HAS_FLOAT8:
            return QuantisedFormat(name, dtype)
        # Triton comes with torch's CUDA builds; elsewhere it may be missing.
        kernel = importlib.import_module("megatron_star.attention.triton_quantised")
        return QuantisedFormat(name, dtype, kernel.attend, kernel.MOST_ROWS)
    if dtype == torch.int8 and quantised_cpu.takes(head_size):
        return QuantisedFormat(name, dtype, quantised_cpu.load(), quantised_cpu.MOST_ROWS)
    return QuantisedFormat(name, dtype)
