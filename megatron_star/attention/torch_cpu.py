"""torch's fused attention on a CPU, with the LSE that `scaled_dot_product_attention` throws away.

The kernel dies of SIGFPE on empty input, reads past head counts that do not divide, and is slow for few rows
in bfloat16: it is given float32 whatever comes in. It has grouped heads.
"""

import torch
from torch import Tensor

from megatron_star.attention.adapter import KernelInfo
from megatron_star.attention.partial import Partial


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Partial:
    """See `Attend`."""
    q, k, v = (tensor.permute(1, 2, 0, 3).float() for tensor in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p=0.0, is_causal=causal, scale=softmax_scale
    )
    return Partial(out, lse)


TORCH_CPU = KernelInfo(
    name="torch-cpu",
    load=lambda: attend,
    device_type="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    max_head_size=1 << 16,
    head_size_multiple=1,
    folded_rows=64,
)
