"""The choice of the attention kernel: made once, by name, when a model is set up."""

import torch

from megatron_star.attention import (
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    torch_cpu,
    torch_cuda,
    transformer_engine,
)
from megatron_star.attention.adapter import KernelInfo
from megatron_star.attention.partial import AttentionKernel

KERNELS: dict[str, KernelInfo] = {
    info.name: info
    for info in (
        torch_cpu.TORCH_CPU,
        flash_attn_4.FLASH_ATTN_4,
        flash_attn_3.FLASH_ATTN_3,
        flash_attn_2.DENSE,
        torch_cuda.FLASH,
        torch_cuda.EFFICIENT,
        flash_attn_2.VARLEN,
        flash_attn_2.KVCACHE,
        torch_cuda.CUDNN,
        transformer_engine.THD,
        transformer_engine.SBHD,
        transformer_engine.BSHD,
    )
}
KERNEL_NAMES = ("auto", *KERNELS)
AUTO = ("torch-cpu", "flash-attn-4", "flash-attn-3", "flash-attn-2", "torch-flash", "torch-efficient")
"""In this order `auto` tries. cuDNN's kernels are not in it: where lengths change with each token, it builds
plans instead of attending."""


def select_kernel(name: str, *, device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionKernel:
    """The kernel of this name; `auto` takes the first of `AUTO` that is installed and fits.

    Raises:
        ValueError: no kernel has this name, it is not installed, or it cannot run such attention.
        ImportError: its package is installed, but does not import: never a reason to take another one.
    """
    if name == "auto":
        return _automatic(device, dtype, head_size).loaded()
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}: it must be one of {', '.join(KERNEL_NAMES)}")
    info = KERNELS[name]
    if obstacle := info.obstacle(device, dtype, head_size):
        raise ValueError(f"attention kernel {name!r} cannot be used here: {obstacle}")
    if not info.is_installed:
        raise ValueError(
            f"attention kernel {name!r} needs {info.distribution}, which is not installed: {info.install}"
        )
    return info.loaded()


def _automatic(device: torch.device, dtype: torch.dtype, head_size: int) -> KernelInfo:
    obstacles = {name: KERNELS[name].obstacle(device, dtype, head_size) for name in AUTO}
    for name, obstacle in obstacles.items():
        if obstacle is None and KERNELS[name].is_installed:
            return KERNELS[name]
    reasons = "; ".join(f"{name}: {obstacle or 'not installed'}" for name, obstacle in obstacles.items())
    raise ValueError(f"no attention kernel fits. {reasons}")
