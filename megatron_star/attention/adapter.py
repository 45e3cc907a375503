"""What is known of a kernel before its library is loaded, and the contract around it once it is.

An adapter file holds a `KernelInfo` for each of its kernels, and translates layout and LSE between the kernel
and `Partial`. What they need alike is done here, once: no empty input, no row without a key, grouped heads,
windows, values of another head size.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_star.attention.band import attend_in_pieces
from megatron_star.attention.partial import Partial, empty_partial

Attend = Callable[..., Partial]
"""query, key, value, causal, softmax_scale, as in `AttentionKernel`; there are rows and keys, and 2 or more
of both if causal. Then there are as many of both, unless its `KernelInfo` says `bottom_right`. With
`max_window`, a window may follow as a sixth argument, smaller than the number of keys."""

ALL_ROWS = sys.maxsize
ANY_WINDOW = sys.maxsize
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KernelInfo:
    """A kernel that can be chosen by name.

    Attributes:
        load: imports the library and returns the kernel.
        load_capped: likewise, one whose scores are softcap * tanh(score / softcap); None if it has none.
        min_capability, below_capability: compute capability of the GPU, for kernels on CUDA.
        bottom_right: whether a causal mask may have more keys than rows.
        max_window: the widest window that a causal mask may have, and then more keys than rows too; 0 for
            none.
        max_head_size, head_size_multiple: limits on the head size.
        other_value_sizes: whether values may have another head size than keys. Otherwise they are padded.
        folded_rows: up to so many query rows that see all keys, the query heads of a group are folded into
            rows, so that their KV is read once; ALL_ROWS for kernels without grouped heads.
        min_keys: with fewer, which can only be one, no kernel is needed (`attend_one_key`).
        distribution: the Python package that it comes in, if that is not torch.
        install: what to do where that package is missing.
    """

    name: str
    load: Callable[[], Attend]
    load_capped: Callable[[float], Attend] | None = None
    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = HALF_PRECISION
    min_capability: tuple[int, int] = (8, 0)
    below_capability: tuple[float, int] = (math.inf, 0)
    bottom_right: bool = False
    max_window: int = 0
    max_head_size: int = 256
    head_size_multiple: int = 8
    other_value_sizes: bool = False
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

    def obstacle(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_size: int,
        *,
        softcap: float | None = None,
        value_size: int | None = None,
    ) -> str | None:
        """Why it cannot run such attention, in words, or None if it can."""
        if device.type != self.device_type:
            return f"it runs on {self.device_type}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"it computes in {_names(self.dtypes)}, not in {_names([dtype])}"
        for size in (head_size, value_size or head_size):
            if size > self.max_head_size or size % self.head_size_multiple:
                return (
                    f"it takes head sizes up to {self.max_head_size} that {self.head_size_multiple} divides, "
                    f"not {size}"
                )
        if softcap is not None and self.load_capped is None:
            return "it has no soft cap"
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

    def loaded(self, softcap: float | None = None) -> "LoadedKernel":
        """The kernel behind the contract, with such a soft cap on its scores.

        Raises:
            ImportError: its package is installed, but does not import.
        """
        try:
            attend = self.load() if softcap is None else self.load_capped(softcap)
        except Exception as error:
            raise ImportError(
                f"attention kernel {self.name!r}: {self.distribution} is installed but broken: {error}"
            ) from error
        return LoadedKernel(self, attend)


class Mask(NamedTuple):
    """What rows see: all keys, or those up to their own, of which a window may leave the last ones."""

    causal: bool
    window: int | None


@dataclass(frozen=True)
class LoadedKernel:
    """An `AttentionKernel`: gives a library's kernel only what that can take."""

    info: KernelInfo
    attend: Attend

    @property
    def name(self) -> str:
        """By which it can be chosen."""
        return self.info.name

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        """See `AttentionKernel`."""
        sq, sk = query.size(0), key.size(0)
        assert query.size(2) % key.size(2) == 0 and (not causal or sq <= sk)
        assert window is None or (causal and window >= 1)
        if sq == 0 or sk == 0:
            return empty_partial(query, value.size(3))
        if window is not None:
            first_seen = max(0, sk - (sq - 1) - window)
            key, value = key[first_seen:], value[first_seen:]
        mask = Mask(causal and sq > 1, None if sq == 1 or window is None or window >= key.size(0) else window)
        if query.size(3) != value.size(3) and not self.info.other_value_sizes:
            return self._attend_padded(query, key, value, softmax_scale, mask)
        return self._attend_masked(query, key, value, softmax_scale, mask)

    def _attend_padded(
        self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, mask: Mask
    ) -> Partial:
        """With zeros behind each head of query and key, or of value, so that all have the same size."""
        size = max(query.size(3), value.size(3))
        query, key, padded = (pad(tensor, (0, size - tensor.size(3))) for tensor in (query, key, value))
        out, lse = self._attend_masked(query, key, padded, softmax_scale, mask)
        return Partial(out[..., : value.size(3)], lse)

    def _attend_masked(
        self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, mask: Mask
    ) -> Partial:
        """Natively where the library can, otherwise in pieces."""
        if not mask.causal:
            return self._attend_to_all(query, key, value, softmax_scale)
        if mask.window is not None and mask.window <= self.info.max_window:
            return self.attend(query, key, value, True, softmax_scale, mask.window)
        is_square = query.size(0) == key.size(0)
        if mask.window is None and (is_square or self.info.bottom_right):
            return self.attend(query, key, value, True, softmax_scale)

        def attend_piece(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Partial:
            if causal and query.size(0) > 1:
                return self.attend(query, key, value, True, softmax_scale)
            return self._attend_to_all(query, key, value, softmax_scale)

        return attend_in_pieces(attend_piece, query, key, value, mask.window)

    def _attend_to_all(self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
        """Every row sees every key."""
        if key.size(0) < self.info.min_keys:
            return attend_one_key(query, key, value, softmax_scale)
        if query.size(0) <= self.info.folded_rows and query.size(2) > key.size(2):
            return self._attend_with_folded_groups(query, key, value, softmax_scale)
        return self.attend(query, key, value, False, softmax_scale)

    def _attend_with_folded_groups(
        self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Partial:
        """Without a mask, rows are independent: [sq, b, ng * r, hn] is [sq * r, b, ng, hn]."""
        sq, b, np, hn = query.shape
        ng, hv = value.shape[2:]
        if sq == 1:  # as below, with fewer views: this is done for each layer of each token
            rows = query.view(b, ng, np // ng, hn).permute(2, 0, 1, 3)
            out, lse = self.attend(rows, key, value, False, softmax_scale)
            return Partial(out.reshape(b, np, 1, hv), lse.reshape(b, np, 1))
        rows = query.view(sq, b, ng, np // ng, hn).permute(0, 3, 1, 2, 4).reshape(-1, b, ng, hn)
        out, lse = self.attend(rows, key, value, False, softmax_scale)
        out = out.reshape(b, ng, sq, np // ng, hv).transpose(2, 3).reshape(b, np, sq, hv)
        return Partial(out, lse.reshape(b, ng, sq, np // ng).transpose(2, 3).reshape(b, np, sq))


def attend_one_key(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """Attention to a single key, [1, b, ng, hn], without a softmax: its value, and its score as the LSE."""
    sq, b, np, hn = query.shape
    ng, hv = value.shape[2:]
    rows = query.float().view(sq, b, ng, np // ng, hn)
    scores = (rows * key.float().unsqueeze(3)).sum(-1) * softmax_scale
    out = value.unsqueeze(3).expand(sq, b, ng, np // ng, hv).clone(memory_format=torch.contiguous_format)
    return Partial(out.view(sq, b, np, hv).permute(1, 2, 0, 3), scores.view(sq, b, np).permute(1, 2, 0))


def pack(tensor: Tensor) -> Tensor:
    """[s, b, h, hn] to the packed layout `thd`, [b * s, h, hn]: sequence after sequence."""
    return tensor.transpose(0, 1).flatten(0, 1)


def cumulative_lengths(tensor: Tensor) -> Tensor:
    """[b + 1], int32: where each sequence of the packed [s, b, h, hn] starts, and where the last one ends."""
    s, b = tensor.shape[:2]
    return torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=tensor.device)


def _names(dtypes: tuple[torch.dtype, ...] | list[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
