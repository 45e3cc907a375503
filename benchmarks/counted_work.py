"""What an encoding really computes on this rank: multiplications and additions, counted as they are done."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.partial import AttentionKernel, Partial
from megatron_star.parallel.exchange import Exchange
from megatron_star.planning.layer_mask import Window
from megatron_star.planning.model_shape import LatentAttention, latent_attention
from megatron_star.planning.plan import ContextPlan


class CountedWork(NamedTuple):
    """Floating-point operations, and bytes that this rank handed to exchanges.

    Naming keys is not counted, nor predicted: a few operations for each value of a key.
    """

    linear: float
    attention: float
    bytes_sent: int


class _CountingKernel:
    """A kernel that counts visible (query, key) pairs; torch's counter takes causal calls for full ones."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel, self.operations = kernel, 0.0

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
        rows, _, heads, head_size = query.shape
        seen = Window(window or len(key))
        pairs = seen.pairs(len(key) - rows, len(key)) if causal else rows * len(key)
        self.operations += 2.0 * pairs * heads * (head_size + value.size(3))
        return self.kernel(query, key, value, causal=causal, softmax_scale=softmax_scale, window=window)


def _linear_operations(inputs: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * inputs.numel() * weight[0]


FORMULAS = {
    # What `megatron_star.speed.linear` calls, and torch's counter does not know.
    getattr(torch.ops.mkldnn, name): _linear_operations
    for name in ("_linear_pointwise",)
    if hasattr(torch.ops.mkldnn, name)
} | {
    # `_CountingKernel` counts these; torch's own formulas refuse grouped heads (seen in torch 2.11).
    getattr(torch.ops.aten, name): lambda *_, **__: 0
    for name in (
        "_flash_attention_forward",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        # Similarities of keys with their mean, where keys are named. Of products with weights, only those of
        # absorbed latent attention are batched; see `_up_projections`.
        "bmm",
    )
}


def _up_projections(latent: LatentAttention, tp_size: int) -> Callable[..., int]:
    """What counts the batched products with a rank's heads of the up-projection, and no others."""
    heads, rank = latent.num_attention_heads // tp_size, latent.kv_lora_rank
    weights = ((heads, latent.qk_head_dim, rank), (heads, rank, latent.v_head_dim))

    def operations(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
        return 2 * left.numel() * right[2] if tuple(right) in weights else 0

    return operations


def _formulas(config: TransformerConfig) -> dict[object, Callable[..., int]]:
    latent = latent_attention(config)
    if not latent:
        return FORMULAS
    return FORMULAS | {torch.ops.aten.bmm: _up_projections(latent, config.tensor_model_parallel_size)}


def count_work(star_model: StarModel, token_ids: Sequence[int], plan: ContextPlan) -> CountedWork:
    """Encode a context and count."""
    kernel = _CountingKernel(star_model.kernel)
    star_model.exchange.counts.clear()
    with FlopCounterMode(display=False, custom_mapping=_formulas(star_model.model.config)) as products:
        encode_context(replace(star_model, kernel=kernel), token_ids, plan)
    counted = products.get_flop_counts()["Global"]
    linear = sum(count for operation, count in counted.items() if "attention" not in str(operation))
    return CountedWork(linear, kernel.operations, encoding_bytes_of(star_model.exchange))


def encoding_bytes_of(exchange: Exchange) -> int:
    """What this rank handed to the exchanges of encodings since its counts were cleared."""
    return exchange.counts["broadcast_bytes"] + exchange.counts["pass_bytes"]
