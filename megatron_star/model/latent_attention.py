"""Megatron's multi-head latent attention with Star Attention as its core (`attention/latent_kernel.py`).

Shapes: sq tokens of this forward pass, b = 1, np query heads of this TP rank; l values of a latent, d and r
those of a head's query that are not rotated and that are.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_star.attention.latent_kernel import Latent
from megatron_star.model.attention import ByPosition, ForwardPass
from megatron_star.model.rotary import cosines_and_sines, rotate
from megatron_star.model.transformer_config import OWN_FIELDS, StarMLATransformerConfig, own_field
from megatron_star.planning.layer_mask import layer_masks

_PLAIN = {"cache_mla_latents": False, "softmax_type": "vanilla", "no_rope_freq": None}
_PLAIN_OWN = (
    "attention_softcap",
    "query_scale_beta",
    "longrope_short_factors",
    "window_rotary_base",
    "qk_layernorm_span",
    "qk_layernorm_after_rotation",
    "qk_norm_of_rotated_only",
)
"""Fields of a configuration that latent attention does not compute, with the values that say nothing."""


def check_latent_attention(config: MLATransformerConfig) -> None:
    """Refuse, by name, what is computed in other layers' attention and not here.

    Raises:
        ValueError: a field has another value than by default, or a layer has a mask of its own.
    """
    values = _PLAIN | {name: OWN_FIELDS[name].default for name in _PLAIN_OWN}
    for name, value in values.items():
        found = own_field(config, name) if name in OWN_FIELDS else getattr(config, name)
        if found != value and (found or value):
            raise ValueError(f"multi-head latent attention does not support {name}={found!r}")
    if any(layer_masks(config)):
        raise ValueError("multi-head latent attention does not support layers with a window or with chunks")


class StarMLASelfAttention(MLASelfAttention):
    """Megatron's MLASelfAttention, of whose KV the forward pass keeps the latent and the rotated part of the
    key."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **options: Any) -> None:
        check_latent_attention(config)
        super().__init__(config, *args, **options)
        if hasattr(self.linear_kv_up_proj, "layer_norm_weight"):
            raise ValueError(
                "Star Attention keeps latents after their norm, which is inside of linear_kv_up_proj in a "
                f"layer of {type(self.linear_kv_up_proj).__name__}: give the specification a kv_layernorm"
            )
        up_projection = self.linear_kv_up_proj
        self.core_attention.layer = self.core_attention.layer._replace(
            latent=Latent(lambda: up_projection.weight, config)
        )
        # Megatron's configuration has no word for it: pairs are always adjacent in its latent attention.
        self._has_adjacent_pairs = (
            not isinstance(config, StarMLATransformerConfig) or config.rotary_interleaved
        )
        self._concentration = 1.0
        if config.rope_type == "yarn":
            self._concentration = _yarn_get_concentration_factor(
                config.rotary_scaling_factor, config.mscale, config.mscale_all_dim
            )

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """What Megatron resolves; it has a norm before queries of full rank, as no model that we convert."""
        if self.config.q_lora_rank is not None or not isinstance(self.config, StarMLATransformerConfig):
            return super()._resolve_qk_norm_config(submodules)
        named = {name: getattr(submodules, name) for name in ("linear_q_proj", "linear_kv_up_proj")}
        return named | {"kv_layernorm": submodules.kv_layernorm}

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: object, inference_context: ForwardPass, **__: object
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """[sq, 1, h] to what `ForwardPass.attend` takes: query [sq, 1, np, d + r], key [sq, 1, 1, l + r],
        value [sq, 1, 1, 0]."""
        sizes = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        for_query, for_key = self._qkv_down_projection(hidden_states)
        if for_key.size(-1) != sum(sizes):
            for_key = gather_from_tensor_model_parallel_region(for_key, group=self.tp_group)
        cos, sin, _ = self.by_position(inference_context, None, hidden_states.dtype)
        latent, rotated = for_key.unsqueeze(2).split(sizes, -1)
        key = torch.cat((self.kv_layernorm(latent), self._rotate(rotated, cos, sin)), -1)
        query = self._queries(for_query)
        plain, rotated = query.split((self.config.qk_head_dim, sizes[1]), -1)
        query = torch.cat((plain, self._rotate(rotated, cos, sin)), -1)
        return query, key, key[..., :0], None, None

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """[sq, 1, h], or projected down, to [sq, 1, np, d + r]."""
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(hidden_states))
        return query.unflatten(-1, (self.num_attention_heads_per_partition, self.q_head_dim))

    def by_position(self, forward_pass: ForwardPass, angles: object, dtype: torch.dtype) -> ByPosition:
        """See `StarSelfAttention.by_position`; the angles are its own."""
        return forward_pass.once(
            "of latent attention", lambda: self.make_by_position(forward_pass.position_ids, angles, dtype)
        )

    def make_by_position(self, position_ids: Tensor, _: object, dtype: torch.dtype) -> ByPosition:
        """See `StarSelfAttention.make_by_position`."""
        angles, _ = self.rotary_pos_emb((position_ids, (False,)))  # no latent attention has longrope
        return ByPosition(*cosines_and_sines(angles, self._concentration, dtype), None)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(heads, cos, sin, interleaved=self._has_adjacent_pairs)

    def _adjust_key_value_for_inference(
        self,
        inference_context: ForwardPass,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor, Tensor, None, AttnMaskType, None]:
        """As they are."""
        self.core_attention.forward_pass = inference_context
        return query, key, value, None, self.attn_mask_type, None
