"""Logits of a whole sequence from the Megatron model, in one ordinary causal forward: for comparisons."""

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import AttentionKernel, Partial
from megatron_star.model.attention import ForwardPass, LayerAttention
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import CheckpointInfo
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.expert_layer import ExpertRows, moe_layers, share_rows
from megatron_star.model.kernel import kernel_of
from megatron_star.model.logits import soft_capped
from megatron_star.model.longrope import needs_long_factors
from megatron_star.model.stored_weights import load_weights
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import initialize_groups
from megatron_star.planning.layer_mask import Band


class _CausalAttention(ForwardPass):
    """Every token attends to itself and to what is before it; nothing is kept."""

    def __init__(self, position_ids: Tensor, kernel: AttentionKernel, is_long: bool) -> None:
        super().__init__(position_ids, (is_long,))
        self.config.materialize_only_last_token_logits = False
        self.kernel = kernel

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """See `ForwardPass.attend`."""
        num_tokens = query.size(0)
        if layer.latent:
            key, value = layer.latent.expanded(key)
        if query.dtype == torch.float64:
            query, key, value = (tensor.float() for tensor in (query, key, value))
        bands = layer.mask.bands(0, num_tokens) if layer.mask else (Band(0, num_tokens, 0, None),)
        partials, attend = (
            PartialSum(query, value.size(3)),
            partial(self.kernel, softmax_scale=layer.softmax_scale),
        )
        for start, end, first, window in bands:
            keys = slice(first, end)
            part = attend(query[start:end], key[keys], value[keys], causal=True, window=window)
            partials.set_rows(start, end, part)
        return partials.merged()


def megatron_logits(
    info: CheckpointInfo, token_ids: Sequence[int], *, tp_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[tokens, vocab_size], float32, on every rank; torch.distributed must have `tp_size` ranks.

    The model is in `dtype`, whatever that of the checkpoint. In float64 its attention is in float32: no
    kernel computes in more.
    """
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=tp_size, cp_size=1)
    model = build_gpt_model(info.args, groups.model, dtype=dtype, device=device)
    load_weights(model, info)
    positions = torch.arange(len(token_ids), device=device)
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    kernel = kernel_of(model, "auto", device=device, dtype=kernel_dtype)
    causal = _CausalAttention(positions, kernel, needs_long_factors(model.config, len(token_ids)))
    share_rows(moe_layers(model), ExpertRows(groups, Exchange(groups.cp))).begin(causal)
    with InferenceMode.active(), torch.inference_mode():
        logits = model(
            torch.tensor([token_ids], device=device),
            positions[None],
            attention_mask=None,
            inference_context=causal,
            runtime_gather_output=True,
        )
    return soft_capped(logits, model.config)[0, :, : info.args["vocab_size"]].float().cpu()
