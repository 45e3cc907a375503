"""FlashAttention 2 (the package flash-attn), in its three forms: dense, packed, and for a KV cache.

It takes [b, s, h, hn] with any strides but the last, has grouped heads, and aligns a causal mask
bottom-right. The packed form gives the LSE as [np, b * sq].
"""

from torch import Tensor

from megatron_star.attention.adapter import ANY_WINDOW, Attend, KernelInfo, cumulative_lengths, pack
from megatron_star.attention.partial import Partial


def load_dense(softcap: float = 0.0) -> Attend:
    """`flash_attn_func`."""
    from flash_attn import flash_attn_func  # noqa: PLC0415

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out, lse, _ = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=_window_size(window),
            softcap=softcap,
            return_attn_probs=True,
        )
        return Partial(out.transpose(1, 2), lse)

    return attend


def load_varlen(softcap: float = 0.0) -> Attend:
    """`flash_attn_varlen_func`."""
    from flash_attn import flash_attn_varlen_func  # noqa: PLC0415

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        sq, b, np, hn = query.shape
        out, lse, _ = flash_attn_varlen_func(
            *(pack(tensor) for tensor in (query, key, value)),
            cu_seqlens_q=cumulative_lengths(query),
            cu_seqlens_k=cumulative_lengths(key),
            max_seqlen_q=sq,
            max_seqlen_k=key.size(0),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=_window_size(window),
            softcap=softcap,
            return_attn_probs=True,
        )
        return Partial(out.view(b, sq, np, hn).transpose(1, 2), lse.view(np, b, sq).transpose(0, 1))

    return attend


def load_kvcache(softcap: float = 0.0) -> Attend:
    """`flash_attn_with_kvcache`, which splits the keys over the GPU when there are few rows."""
    from flash_attn import flash_attn_with_kvcache  # noqa: PLC0415

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out, lse = flash_attn_with_kvcache(
            q,
            k_cache=k,
            v_cache=v,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=_window_size(window),
            softcap=softcap,
            return_softmax_lse=True,
        )
        return Partial(out.transpose(1, 2), lse)

    return attend


def _window_size(window: int | None) -> tuple[int, int]:
    """Keys that a row sees to the left and to the right of its own; -1 is no bound."""
    return (-1, -1) if window is None else (window - 1, 0)


_PACKAGE = {
    "bottom_right": True,
    "max_window": ANY_WINDOW,
    "distribution": "flash-attn",
    "install": "pip install --no-build-isolation 'flash-attn>=2.7,<3'",
    "folded_rows": 64,
}
DENSE = KernelInfo(name="flash-attn-2", load=load_dense, load_capped=load_dense, **_PACKAGE)
VARLEN = KernelInfo(name="flash-attn-2-varlen", load=load_varlen, load_capped=load_varlen, **_PACKAGE)
KVCACHE = KernelInfo(name="flash-attn-2-kvcache", load=load_kvcache, load_capped=load_kvcache, **_PACKAGE)
