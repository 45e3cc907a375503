"""Stand-ins for kernels that need a GPU: the library's own signature, layout and LSE, computed in float64.

Each refuses what the library refuses, or silently misreads. `tests/unit/test_kernel_signatures.py` compares
the signatures with the libraries, where they are installed.
"""

import sys
from enum import IntEnum
from types import ModuleType

import pytest
import reference
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    any_value_size: bool = False,
) -> tuple[Tensor, Tensor]:
    """[b, s, h, hn] each to out [b, s, h, hn] in q's dtype and LSE [b, h, s]; causal is bottom-right.

    `window_size`: keys to the left and to the right of a row's own that it sees; -1 or None is no bound.
    """
    left, right = (-1 if side is None else side for side in window_size)
    assert (left, right) in ((-1, -1), (-1, 0)) or (causal and left >= 0 and right == 0)
    assert q.dtype == k.dtype == v.dtype and k.shape[:3] == v.shape[:3]
    assert any_value_size or k.size(3) == v.size(3)
    assert q.size(0) == k.size(0) and q.size(3) == k.size(3) and q.size(2) % k.size(2) == 0
    assert 0 not in (*q.shape, *k.shape), "no library agrees with another about empty input"
    out, lse = reference.attention(
        *(t.transpose(0, 1) for t in (q, k, v)),
        causal=causal,
        softmax_scale=scale,
        window=None if left == -1 else left + 1,
        softcap=softcap or None,
    )
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.float()


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash-attn 2, dense."""
    check_half(q, k, v)
    out, lse = attend(q, k, v, causal=causal, scale=softmax_scale, window_size=window_size, softcap=softcap)
    return (out, lse.masked_fill(lse == -torch.inf, torch.inf), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2, packed; LSE [np, total query rows]."""
    check_half(q, k, v)
    q, k, v = _unpacked(q, cu_seqlens_q), _unpacked(k, cu_seqlens_k), _unpacked(v, cu_seqlens_k)
    assert (q.size(1), k.size(1)) == (max_seqlen_q, max_seqlen_k)
    out, lse = attend(q, k, v, causal=causal, scale=softmax_scale, window_size=window_size, softcap=softcap)
    packed_lse = lse.transpose(0, 1).flatten(1)
    return (out.flatten(0, 1), packed_lse, None) if return_attn_probs else out.flatten(0, 1)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """flash-attn 2 against a KV cache."""
    check_half(q, k_cache, v_cache)
    assert k is None and v is None, "the adapter adds nothing to the cache"
    out, lse = attend(
        q, k_cache, v_cache, causal=causal, scale=softmax_scale, window_size=window_size, softcap=softcap
    )
    return (out, lse) if return_softmax_lse else out


def flash_attn_func_4(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """flash-attn 4, dense. Without `return_lse` the LSE is left out."""
    check_half(q, k, v)
    out, lse = attend(q, k, v, causal=causal, scale=softmax_scale, window_size=window_size, softcap=softcap)
    return out, lse if return_lse else None


FLASH_ATTN_3_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
    "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0., "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)


def flash_attn_3_fwd(q, k, v, *others, **named):
    """The operator of fa3-fwd: bfloat16 only. torch leaves out what has its default value."""
    check_half(q, k, v)
    assert q.dtype == torch.bfloat16, "the package leaves float16 out"
    options = torch.ops.fa3_fwd.fwd.default._schema.arguments[3:]
    given = {option.name: option.default_value for option in options}
    given |= dict(zip(given, others, strict=False)) | named
    assert given["num_splits"] in (0, 1)
    assert given["window_size_left"] == given["window_size_right"] == -1, "it is built without windows"
    out, lse = attend(
        q, k, v, causal=given["is_causal"], scale=given["softmax_scale"], softcap=given["softcap"]
    )
    return out, lse, torch.empty(0), torch.empty(0)


class FusedAttnBackend(IntEnum):
    """TransformerEngine's kernels."""

    No_Backend = -1
    F16_arbitrary_seqlen = 1
    FP8 = 2


def fused_attn_fwd(
    is_training,
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    fake_dtype,
    fused_attention_backend,
    attn_bias=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    page_table_k=None,
    page_table_v=None,
    s_quantizer=None,
    o_quantizer=None,
    attn_scale=None,
    dropout=0.0,
    fast_zero_fill=True,
    qkv_layout="sbh3d",
    o_format="sbhd",
    qkv_scale_inv_format=None,
    attn_bias_type="no_bias",
    attn_mask_type="padding",
    softmax_type="vanilla",
    window_size=(-1, -1),
    bottom_right_diagonal=None,
    rng_gen=None,
    softmax_offset=None,
    return_max_logit=False,
    cuda_graph=False,
):
    """TransformerEngine; the LSE of `thd` is packed, unless cuDNN is older than 9.6 (`packed_lse`)."""
    layout = qkv_layout.split("_")[0]
    assert qkv_layout == f"{layout}_{layout}_{layout}" and o_format == layout
    assert fake_dtype == q.dtype in HALF and fused_attention_backend == 1
    assert all(tensor.is_contiguous() for tensor in (q, k, v)), "strides are made from the layout"
    masks = {"no_mask": False, "causal": True, "causal_bottom_right": True}
    if layout == "thd":
        masks = {"padding": False, "padding_causal": True, "padding_causal_bottom_right": True}
    assert attn_mask_type in masks, f"{attn_mask_type} with {layout}"
    if layout == "thd":
        assert cu_seqlens_q_padded is not None and cu_seqlens_kv_padded is not None
        q, k, v = _unpacked(q, cu_seqlens_q), _unpacked(k, cu_seqlens_kv), _unpacked(v, cu_seqlens_kv)
    elif layout == "sbhd":
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    assert (q.size(1), k.size(1)) == (max_seqlen_q, max_seqlen_kv)
    for lengths, tensor in ((cu_seqlens_q, q), (cu_seqlens_kv, k)):
        assert lengths.dtype == torch.int32 and lengths.tolist() == _starts(tensor)
    assert q.size(1) == k.size(1) or not attn_mask_type.endswith("causal"), "top-left"
    out, lse = attend(q, k, v, causal=masks[attn_mask_type], scale=attn_scale, window_size=window_size)
    out = {"thd": out.flatten(0, 1), "sbhd": out.transpose(0, 1).contiguous(), "bshd": out}[layout]
    if layout == "thd" and fused_attn_fwd.packed_lse:
        lse = lse.transpose(1, 2).flatten(0, 1)
    return out, [lse.unsqueeze(-1), torch.zeros(2, dtype=torch.int64)]


fused_attn_fwd.packed_lse = True


def install_library_stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stubs where the adapters import the libraries from."""
    _install(
        monkeypatch,
        "flash_attn",
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )
    _install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func_4)
    _install(monkeypatch, "fa3_fwd_interface")
    package = "transformer_engine.pytorch.cpp_extensions.fused_attn"
    for depth in range(1, 4):
        _install(monkeypatch, ".".join(package.split(".")[:depth]))
    _install(monkeypatch, package, fused_attn_fwd=fused_attn_fwd, FusedAttnBackend=FusedAttnBackend)


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def check_half(*tensors: Tensor) -> None:
    assert all(tensor.dtype in HALF and tensor.stride(-1) == 1 for tensor in tensors)


def _unpacked(tensor: Tensor, starts: Tensor) -> Tensor:
    """[t, h, hn] of sequences of one length to [b, s, h, hn]."""
    assert tensor.dim() == 3 and starts.dtype == torch.int32 and starts[-1] == tensor.size(0)
    unpacked = tensor.unflatten(0, (starts.numel() - 1, -1))
    assert starts.tolist() == _starts(unpacked)
    return unpacked


def _starts(tensor: Tensor) -> list[int]:
    """Starts of the sequences of [b, s, h, hn] when packed, and the end of the last."""
    return [tensor.size(1) * i for i in range(tensor.size(0) + 1)]
