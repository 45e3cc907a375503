"""torch's fused attention on a CPU, with the LSE that `scaled_dot_product_attention` throws away.

The kernel dies of SIGFPE on empty input and reads past head counts that do not divide. It has grouped heads.
In half precision it is slow for many rows: it is given float32.
"""

import torch
from torch import Tensor

from megatron_star.attention.adapter import KernelInfo
from megatron_star.attention.partial import Partial

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Partial:
    """See `Attend`."""
    q, k, v = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    if query.dtype != torch.float32:
        q, k, v = q.float(), k.float(), v.float()
    return Partial(*FUSED(q, k, v, 0.0, causal, scale=softmax_scale))


TORCH_CPU = KernelInfo(
    name="torch-cpu",
    load=lambda: attend,
    device_type="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    max_head_size=1 << 16,
    head_size_multiple=1,
    folded_rows=64,
)
