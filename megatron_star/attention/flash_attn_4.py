"""FlashAttention 4 (the package flash-attn-4), whose kernels are compiled at their first call.

It takes [b, s, h, hn], has grouped heads and folds them into rows itself, and splits the keys over the GPU
when it is asked to choose how (`num_splits=0`): on Blackwell. On older GPUs it cannot split them, and leaves
most of a GPU idle when there are few rows, so it is not used there. Its folder is that of flash-attn 2:
install one of the two.
"""

from torch import Tensor

from megatron_star.attention.adapter import ANY_WINDOW, Attend, KernelInfo
from megatron_star.attention.partial import Partial


def load(softcap: float = 0.0) -> Attend:
    """`flash_attn.cute.flash_attn_func`."""
    from flash_attn.cute import flash_attn_func  # noqa: PLC0415

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out, lse = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=(None, None) if window is None else (window - 1, 0),
            softcap=softcap,
            num_splits=0,
            return_lse=True,
        )
        return Partial(out.transpose(1, 2), lse)

    return attend


FLASH_ATTN_4 = KernelInfo(
    name="flash-attn-4",
    load=load,
    load_capped=load,
    bottom_right=True,
    max_window=ANY_WINDOW,
    min_capability=(10, 0),
    max_head_size=128,
    distribution="flash-attn-4",
    install="pip install --pre flash-attn-4",
)
