"""The attention kernel of a model."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.partial import AttentionKernel
from megatron_star.model.transformer_config import own_field


def kernel_of(model: GPTModel, name: str, *, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel of this name for the model's attention; raises what `select_kernel` does."""
    softcap = own_field(model.config, "attention_softcap")
    head_size = model.config.kv_channels
    return select_kernel(name, device=device, dtype=dtype, head_size=head_size, softcap=softcap)
