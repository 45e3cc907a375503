"""TransformerEngine's fused attention (cuDNN), below `DotProductAttention`, which cannot return the LSE.

It takes contiguous tensors in a layout that it is told, and gives the LSE as its first auxiliary tensor. In
the layouts `sbhd` and `bshd`, cuDNN builds an execution plan (tenths of a second) for each new pair of
lengths; in `thd`, lengths are data, and one plan serves a whole range of them.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_star.attention.adapter import ANY_WINDOW, Attend, KernelInfo, cumulative_lengths, pack
from megatron_star.attention.partial import Partial

DENSE_MASKS = ("no_mask", "causal", "causal_bottom_right")
PACKED_MASKS = ("padding", "padding_causal", "padding_causal_bottom_right")
"""Without a mask, of a square, and of more keys than rows: on a square, where the last two are the same, more
versions of cuDNN have the second."""


def load_sbhd() -> Attend:
    """Layout `sbhd`, Megatron's own: nothing is moved if the tensors are contiguous."""
    return _load("sbhd", lambda tensor: tensor, lambda out, b: out)


def load_bshd() -> Attend:
    """Layout `bshd`."""
    return _load("bshd", lambda tensor: tensor.transpose(0, 1), lambda out, b: out.transpose(0, 1))


def load_thd() -> Attend:
    """Layout `thd`, packed. With one sequence it is `sbhd` in memory."""
    return _load("thd", pack, lambda out, b: out.unflatten(0, (b, -1)).transpose(0, 1))


def _load(
    layout: str, to_layout: Callable[[Tensor], Tensor], to_sbhd: Callable[[Tensor, int], Tensor]
) -> Attend:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import (  # noqa: PLC0415
        FusedAttnBackend,
        fused_attn_fwd,
    )

    masks = PACKED_MASKS if layout == "thd" else DENSE_MASKS

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        sq, b = query.shape[:2]
        query_starts, key_starts = cumulative_lengths(query), cumulative_lengths(key)
        q, k, v = (to_layout(tensor).contiguous() for tensor in (query, key, value))
        out, (lse, *_) = fused_attn_fwd(
            is_training=False,
            max_seqlen_q=sq,
            max_seqlen_kv=key.size(0),
            cu_seqlens_q=query_starts,
            cu_seqlens_kv=key_starts,
            q=q,
            k=k,
            v=v,
            fake_dtype=query.dtype,
            fused_attention_backend=FusedAttnBackend["F16_arbitrary_seqlen"],
            cu_seqlens_q_padded=query_starts if layout == "thd" else None,
            cu_seqlens_kv_padded=key_starts if layout == "thd" else None,
            attn_scale=softmax_scale,
            qkv_layout=f"{layout}_{layout}_{layout}",
            o_format=layout,
            attn_mask_type=masks[causal + (causal and sq != key.size(0))],
            window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        )
        return Partial(to_sbhd(out, b).permute(1, 2, 0, 3), _dense_lse(lse, b))

    return attend


def _dense_lse(lse: Tensor, b: int) -> Tensor:
    """[b, np, sq, 1], or packed [b * sq, np, 1] (cuDNN 9.6 and newer, for `thd`), to [b, np, sq]."""
    if lse.dim() == 4:
        return lse.squeeze(-1)
    return lse.squeeze(-1).unflatten(0, (b, -1)).transpose(1, 2)


_PACKAGE = {
    "bottom_right": True,
    "max_window": ANY_WINDOW,
    "min_keys": 2,  # of cuDNN; torch refuses a single one to it as well
    "distribution": "transformer-engine",
    "install": "see docs/kernels.md, or use NVIDIA's PyTorch container, which has it",
}
THD = KernelInfo(name="transformer-engine", load=load_thd, **_PACKAGE)
SBHD = KernelInfo(name="transformer-engine-sbhd", load=load_sbhd, **_PACKAGE)
BSHD = KernelInfo(name="transformer-engine-bshd", load=load_bshd, **_PACKAGE)
