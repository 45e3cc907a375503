"""The attention kernel of a model, of one with latent attention the two for either form; its format of KV."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.kv_formats import kv_format
from megatron_star.attention.latent_kernel import LatentKernel
from megatron_star.attention.partial import AttentionKernel
from megatron_star.attention.stored_kv import KvFormat
from megatron_star.attention.torch_latent import TORCH_LATENT
from megatron_star.model.transformer_config import own_field
from megatron_star.planning.layer_mask import Window, layer_masks
from megatron_star.planning.model_shape import latent_attention


def kernel_of(model: GPTModel, name: str, *, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel of this name for the model's attention; raises what `select_kernel` does."""
    softcap = own_field(model.config, "attention_softcap")
    latent = latent_attention(model.config)
    if latent is None:
        head_size = model.config.kv_channels
        windows = [mask.size for mask in layer_masks(model.config) if isinstance(mask, Window)]
        return select_kernel(
            name,
            device=device,
            dtype=dtype,
            head_size=head_size,
            softcap=softcap,
            window=max(windows, default=None),
        )
    head_size = latent.qk_head_dim + latent.qk_pos_emb_head_dim
    expanded = select_kernel(
        name, device=device, dtype=dtype, head_size=head_size, value_size=latent.v_head_dim
    )
    return LatentKernel(latent.stored_values, expanded, TORCH_LATENT.loaded())


def kv_format_of(model: GPTModel, name: str, device: torch.device) -> KvFormat:
    """How contexts of the model are stored; raises what `kv_format` does."""
    softcap = own_field(model.config, "attention_softcap")
    head_size = None if latent_attention(model.config) else model.config.kv_channels
    return kv_format(name, device=device, head_size=head_size, softcap=softcap)
