"""FlashAttention 3 (the package fa3-fwd: the library's forward kernels, built), for Hopper.

It takes [b, s, h, hn] with any strides but the last, has grouped heads and folds them into rows itself,
splits the keys over the GPU where there are few rows, and aligns a causal mask bottom-right. bfloat16 only,
and no windows: both are left out of the package's build (its `fa3_fwd_config.py`).
"""

import importlib

import torch
from torch import Tensor

from megatron_star.attention.adapter import Attend, KernelInfo
from megatron_star.attention.partial import Partial

FEW_ROWS = 64
"""Up to so many rows the library may split the keys. With more, it would take float32 copies of the output
for a GPU that has enough to do."""


def load(softcap: float = 0.0) -> Attend:
    """The operator `fa3_fwd::fwd`, without the package's function, which makes two tensors more a call."""
    importlib.import_module("fa3_fwd_interface")  # registers the operator
    forward = torch.ops.fa3_fwd.fwd.default

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Partial:
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        num_splits = 0 if query.size(0) <= FEW_ROWS else 1  # 0: the library chooses
        out, lse, *_ = forward(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            is_causal=causal,
            softcap=softcap,
            num_splits=num_splits,
        )
        return Partial(out.transpose(1, 2), lse)

    return attend


FLASH_ATTN_3 = KernelInfo(
    name="flash-attn-3",
    load=load,
    load_capped=load,
    bottom_right=True,
    dtypes=(torch.bfloat16,),
    min_capability=(9, 0),
    below_capability=(10, 0),  # the package holds machine code for 8.0 and 9.0
    distribution="fa3-fwd",
    install="pip install 'fa3-fwd>=0.0.3,<0.1' (its builds are for CUDA 13's torch)",
)
