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
from megatron_star.attention.window_kernel import WindowKernel

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


def select_kernel(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    softcap: float | None = None,
    value_size: int | None = None,
    window: int | None = None,
) -> AttentionKernel:
    """The kernel of this name; `auto` takes the first of `AUTO` that is installed and fits.

    Where that one would compute windows in pieces, `auto` lets the first one that has them do it.

    Args:
        head_size: of queries and keys.
        softcap: scores become softcap * tanh(score / softcap), before the mask (Gemma 2, arXiv 2408.00118).
        value_size: head size of values, if it is another.
        window: the widest one of the model's layers, if they have any.

    Raises:
        ValueError: no kernel has this name, it is not installed, or it cannot run such attention.
        ImportError: its package is installed, but does not import: never a reason to take another one.
    """
    if name not in KERNEL_NAMES:
        raise ValueError(f"unknown attention kernel {name!r}: it must be one of {', '.join(KERNEL_NAMES)}")
    names = AUTO if name == "auto" else (name,)
    obstacles = {
        name: KERNELS[name].obstacle(device, dtype, head_size, softcap=softcap, value_size=value_size)
        for name in names
    }
    if name != "auto":
        return _checked(KERNELS[name], obstacles[name]).loaded(softcap)
    info, *others = _all_that_fit(obstacles)
    with_windows = [other for other in others if other.max_window >= (window or 0)]
    if window is None or info.max_window >= window or not with_windows:
        return info.loaded(softcap)
    return WindowKernel(info.loaded(softcap), with_windows[0].loaded(softcap))


def _checked(info: KernelInfo, obstacle: str | None) -> KernelInfo:
    """A kernel that was named, if it can be used."""
    if obstacle:
        raise ValueError(f"attention kernel {info.name!r} cannot be used here: {obstacle}")
    if not info.is_installed:
        missing = f"{info.distribution}, which is not installed: {info.install}"
        raise ValueError(f"attention kernel {info.name!r} needs {missing}")
    return info


def _all_that_fit(obstacles: dict[str, str | None]) -> list[KernelInfo]:
    """At least one, by what is in the way of each kernel, in words."""
    if fitting := [
        KERNELS[name]
        for name, obstacle in obstacles.items()
        if obstacle is None and KERNELS[name].is_installed
    ]:
        return fitting
    reasons = "; ".join(f"{name}: {obstacle or 'not installed'}" for name, obstacle in obstacles.items())
    raise ValueError(f"no attention kernel fits. {reasons}")
