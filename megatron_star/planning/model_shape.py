"""The sizes of a model that decide what it costs, and how many weights each of its layers has.

Layers are of two kinds of MLP, dense and of experts, and attention is plain or latent (multi-head latent
attention, DeepSeek-V2, arXiv 2405.04434). Knows no tensor.
"""

from typing import NamedTuple, Protocol


class ModelShape(Protocol):
    """The fields of Megatron's `TransformerConfig` that decide the cost.

    Fields that not every model has may be missing: those of `layer_masks` and of `latent_attention`,
    `moe_shared_expert_gate` and `moe_latent_size`.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    num_moe_experts: int | None
    moe_layer_freq: int | list[int]
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

    def operations(self, rows: int, keys: int, form: str) -> float:
        """Of rows that all see so many keys: the pairs, and the up-projection of keys or of rows."""
        projected = keys if form == "expanded" else rows
        return rows * keys * self.per_pair(form) + 2.0 * projected * self.up_projection


def latent_attention(shape: ModelShape) -> LatentAttention | None:
    """Of a model that has latent attention; None of another."""
    if not getattr(shape, "multi_latent_attention", False):
        return None
    return LatentAttention(*(getattr(shape, name, None) for name in LatentAttention._fields))


def attention_inputs(shape: ModelShape) -> int:
    """Weights of a layer that its tokens meet before they attend: of plain attention, QKV; of latent, those
    of the queries and the latents.
    """
    heads, hidden_size = shape.num_attention_heads, shape.hidden_size
    if not (latent := latent_attention(shape)):
        return hidden_size * shape.kv_channels * (heads + 2 * shape.num_query_groups)
    query_size = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    rank = latent.q_lora_rank
    queries = (hidden_size + query_size) * rank if rank else hidden_size * query_size
    return queries + hidden_size * latent.stored_values


def attention_weights(shape: ModelShape) -> int:
    """Of a layer: the inputs, the up-projection of latents, and the projection of what is attended to."""
    latent = latent_attention(shape)
    up_projection = latent.up_projection if latent else 0
    value_size = latent.v_head_dim if latent else shape.kv_channels
    output = shape.num_attention_heads * value_size * shape.hidden_size
    return attention_inputs(shape) + up_projection + output


def weights_but_experts(shape: ModelShape, has_experts: bool) -> int:
    """Of a layer's matrices those that every token meets: attention, and the MLP. Where the layer has
    experts instead: the shared ones with their gate, the router, and the projections around latent experts.
    """
    hidden_size, matrices = shape.hidden_size, _matrices(shape)
    if not has_experts:
        return attention_weights(shape) + matrices * hidden_size * shape.ffn_hidden_size
    shared = matrices * (shape.moe_shared_expert_intermediate_size or 0)
    gate = 1 if getattr(shape, "moe_shared_expert_gate", False) else 0
    latents = 2 * (getattr(shape, "moe_latent_size", None) or 0)
    return attention_weights(shape) + hidden_size * (shared + gate + shape.num_moe_experts + latents)


def weights_of_an_expert(shape: ModelShape) -> int:
    """The matrices of one expert of a layer; 0 of a model without experts."""
    return _matrices(shape) * expert_input(shape) * shape.moe_ffn_hidden_size if shape.num_moe_experts else 0


def expert_input(shape: ModelShape) -> int:
    """Values of a token that an expert reads and that it returns."""
    return getattr(shape, "moe_latent_size", None) or shape.hidden_size


def _matrices(shape: ModelShape) -> int:
    return 3 if shape.gated_linear_unit else 2
