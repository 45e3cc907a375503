"""The choice of the attention kernel: made once, by name, when a model is set up."""

from megatron_star.attention import torch_kernel
from megatron_star.attention.partial import AttentionKernel

KERNELS: dict[str, AttentionKernel] = {"torch": torch_kernel.attend}
KERNEL_NAMES = ("auto", *KERNELS)


def select_kernel(name: str) -> AttentionKernel:
    """The kernel of this name; `auto` takes the best one that this machine has.

    Raises:
        ValueError: no kernel has this name.
    """
    if name == "auto":
        name = "torch"
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}: it must be one of {', '.join(KERNEL_NAMES)}")
    return KERNELS[name]
