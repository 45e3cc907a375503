"""The sizes of a model that decide what it costs, and how many weights each of its layers has.

Layers are of two kinds of MLP, dense and of experts, and attention is plain or latent (multi-head latent
attention, DeepSeek-V2, arXiv 2405.04434). Knows no tensor.
"""

from typing import NamedTuple, Protocol


class ModelShape(Protocol):
    """The fields of Megatron's `TransformerConfig` that decide the cost.

    Fields that not every model has may be missing: those of `layer_masks`, of `latent_attention`, and
    `moe_layer_freq`, `moe_shared_expert_gate` and `moe_latent_size`.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    num_moe_experts: int | None
    moe_router_topk: int
    moe_ffn_hidden_size: int | None
    moe_shared_expert_intermediate_size: int | None


class LatentAttention(NamedTuple):
    """Sizes of multi-head latent attention, in Megatron's names.

    A head's query and key have `qk_head_dim` values and `qk_pos_emb_head_dim` rotated ones; all heads share
    the rotated part of the key. Its key and value are made of a latent of `kv_lora_rank` values.
    """

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int

    @property
    def stored_values(self) -> int:
        """What is kept of a token in a layer: its latent and its rotated key."""
        return self.kv_lora_rank + self.qk_pos_emb_head_dim

    @property
    def up_projection(self) -> int:
        """Weights that make all heads' keys and values of a latent."""
        return self.num_attention_heads * self.kv_lora_rank * (self.qk_head_dim + self.v_head_dim)

    def per_pair(self, form: str) -> float:
        """Operations of a visible pair in all heads: two products, with keys and with values.

        form: "expanded", keys and values of each head; or "absorbed", both are the latent.
        """
        if form == "expanded":
            values = self.qk_head_dim + self.qk_pos_emb_head_dim + self.v_head_dim
        else:
            values = 2 * self.kv_lora_rank + self.qk_pos_emb_head_dim
        return 2.0 * self.num_attention_heads * values


def latent_attention(shape: ModelShape) -> LatentAttention | None:
    """Of a model that has latent attention; None of another."""
    if not getattr(shape, "multi_latent_attention", False):
        return None
    return LatentAttention(*(getattr(shape, name) for name in LatentAttention._fields))
