"""What is known of a kernel before its library is loaded, and the contract around it once it is.

An adapter file holds a `KernelInfo` for each of its kernels, and translates layout and LSE between the kernel
and `Partial`. What they need alike (no empty input, no row without a key, grouped heads) is done once, here.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from megatron_star.attention.partial import AttentionKernel, Partial, empty_partial

Attend = Callable[[Tensor, Tensor, Tensor, bool, float], Partial]
"""query, key, value, causal, softmax_scale as in `AttentionKernel`; there are rows and keys."""

ALL_ROWS = sys.maxsize
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KernelInfo:
    """A kernel that can be chosen by name.

    Attributes:
        load: imports the library and returns the kernel.
        min_capability, below_capability: compute capability of the GPU, for kernels on CUDA.
        max_head_size, head_size_multiple: limits on the head size.
        folded_rows: up to so many query rows that see all keys, the query heads of a group are folded into
            rows, so that their KV is read once; ALL_ROWS for kernels without grouped heads.
        min_keys: with fewer, which can only be one, no kernel is needed (`attend_one_key`).
        distribution: the Python package that it comes in, if that is not torch.
        install: what to do where that package is missing.
    """

    name: str
    load: Callable[[], Attend]
    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = HALF_PRECISION
    min_capability: tuple[int, int] = (8, 0)
    below_capability: tuple[float, int] = (math.inf, 0)
    max_head_size: int = 256
    head_size_multiple: int = 8
    folded_rows: int = 0
    min_keys: int = 1
    distribution: str = "torch"
    install: str = "pip install torch"

    @property
    def is_installed(self) -> bool:
        """Whether its package is here; whether that works only `load` tells."""
        try:
            metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return False
        return True

    def obstacle(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Why it cannot run such attention, in words, or None if it can."""
        if device.type != self.device_type:
            return f"it runs on {self.device_type}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"it computes in {_names(self.dtypes)}, not in {_names([dtype])}"
        if head_size > self.max_head_size or head_size % self.head_size_multiple:
            return (
                f"it takes head sizes up to {self.max_head_size} that {self.head_size_multiple} divides, "
                f"not {head_size}"
            )
        if device.type == "cuda":
            return self._obstacle_of_capability(torch.cuda.get_device_capability(device))
        return None

    def _obstacle_of_capability(self, capability: tuple[int, int]) -> str | None:
        if capability < self.min_capability:
            return "it needs a GPU of compute capability {}.{} or newer".format(*self.min_capability)
        if capability >= self.below_capability:
            return "it runs on GPUs of compute capability below {}.{}, not {}.{}".format(
                *self.below_capability, *capability
            )
        return None

    def loaded(self) -> AttentionKernel:
        """The kernel behind the contract.

        Raises:
            ImportError: its package is installed, but does not import.
        """
        try:
            attend = self.load()
        except Exception as error:
            raise ImportError(
                f"attention kernel {self.name!r}: {self.distribution} is installed but broken: {error}"
            ) from error
        return LoadedKernel(self.name, attend, self.folded_rows, self.min_keys)


@dataclass(frozen=True)
class LoadedKernel:
    """An `AttentionKernel`: gives a library's kernel only what all of them can take."""

    name: str
    attend: Attend
    folded_rows: int
    min_keys: int = 1

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, softmax_scale: float
    ) -> Partial:
        """See `AttentionKernel`."""
        sq, sk = query.size(0), key.size(0)
        assert query.size(2) % key.size(2) == 0 and not (causal and sq != sk)
        if sq == 0 or sk == 0:
            return empty_partial(query)
        if sk < self.min_keys:
            return attend_one_key(query, key, value, softmax_scale)
        if not causal and sq <= self.folded_rows and query.size(2) > key.size(2):
            return self._attend_with_folded_groups(query, key, value, softmax_scale)
        return self.attend(query, key, value, causal, softmax_scale)

    def _attend_with_folded_groups(
        self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Partial:
        """Without a mask, rows are independent: [sq, b, ng * r, hn] is [sq * r, b, ng, hn]."""
        sq, b, np, hn = query.shape
        ng = key.size(2)
        if sq == 1:  # as below, with fewer views: this is done for each layer of each token
            rows = query.view(b, ng, np // ng, hn).permute(2, 0, 1, 3)
            out, lse = self.attend(rows, key, value, False, softmax_scale)
            return Partial(out.reshape(b, np, 1, hn), lse.reshape(b, np, 1))
        rows = query.view(sq, b, ng, np // ng, hn).permute(0, 3, 1, 2, 4).reshape(-1, b, ng, hn)
        out, lse = self.attend(rows, key, value, False, softmax_scale)
        out = out.reshape(b, ng, sq, np // ng, hn).transpose(2, 3).reshape(b, np, sq, hn)
        return Partial(out, lse.reshape(b, ng, sq, np // ng).transpose(2, 3).reshape(b, np, sq))


def attend_one_key(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """Attention to a single key, [1, b, ng, hn], without a softmax: its value, and its score as the LSE."""
    sq, b, np, hn = query.shape
    ng = key.size(2)
    rows = query.float().view(sq, b, ng, np // ng, hn)
    scores = (rows * key.float().unsqueeze(3)).sum(-1) * softmax_scale
    out = value.unsqueeze(3).expand(sq, b, ng, np // ng, hn).clone(memory_format=torch.contiguous_format)
    return Partial(out.view(sq, b, np, hn).permute(1, 2, 0, 3), scores.view(sq, b, np).permute(1, 2, 0))


def pack(tensor: Tensor) -> Tensor:
    """[s, b, h, hn] to the packed layout `thd`, [b * s, h, hn]: sequence after sequence."""
    return tensor.transpose(0, 1).flatten(0, 1)


def cumulative_lengths(tensor: Tensor) -> Tensor:
    """[b + 1], int32: where each sequence of the packed [s, b, h, hn] starts, and where the last one ends."""
    s, b = tensor.shape[:2]
    return torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=tensor.device)


def _names(dtypes: tuple[torch.dtype, ...] | list[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
