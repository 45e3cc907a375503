"""A model as plans see it: its shape, its vocabulary, and how many weights that makes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_star.planning.expert_layers import expert_layers
from megatron_star.planning.model_shape import weights_but_experts, weights_of_an_expert

_SAME_NAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "vocab_size"),
)
_OF_EXPERTS = (
    *("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("moe_shared_expert_gate", "moe_latent_size", "moe_layer_freq"),
)
_OF_ATTENTION = (
    *("window_size", "window_attn_skip_freq", "attention_chunk_size", "chunked_layers"),
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"),
    "v_head_dim",
)


@dataclass(frozen=True)
class ModelSize:
    """A `ModelShape` with what its weights need besides. Tied embeddings are the output layer as well."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    vocab_size: int
    tied_embeddings: bool
    num_moe_experts: int | None = None
    moe_layer_freq: int | tuple[int, ...] = 1
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_latent_size: int | None = None
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: tuple[int, ...] | None = None
    attention_chunk_size: int | None = None
    chunked_layers: tuple[int, ...] | None = None
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None

    @classmethod
    def of_arguments(cls, args: Mapping[str, Any]) -> "ModelSize":
        """From Megatron's argument names, as a converted checkpoint carries them."""
        optional = (*_OF_ATTENTION, *(_OF_EXPERTS if args.get("num_experts") else ()))
        given = {name: _frozen(args[name]) for name in optional if args.get(name) is not None}
        return cls(
            **{name: args[name] for name in _SAME_NAME},
            gated_linear_unit=args["swiglu"] or args.get("gated_mlp", False),
            tied_embeddings=not args["untie_embeddings_and_output_weights"],
            num_moe_experts=args.get("num_experts"),
            **given,
        )

    @property
    def num_expert_layers(self) -> int:
        """Layers that have experts instead of one MLP."""
        return sum(expert_layers(self))

    @property
    def num_parameters(self) -> int:
        """All weight matrices; norms and biases are left out."""
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return self._besides_experts + embedding + self.num_expert_parameters

    @property
    def num_expert_parameters(self) -> int:
        """Those of all experts that a router chooses from."""
        return self.num_expert_layers * (self.num_moe_experts or 0) * weights_of_an_expert(self)

    @property
    def num_parameters_per_token(self) -> int:
        """The active ones, which generating one token reads: of its experts, and of the output layer, but not
        the embedding.
        """
        return self._besides_experts + self.num_chosen_parameters

    @property
    def num_chosen_parameters(self) -> int:
        """Those of the experts that one token chooses."""
        return self.num_expert_layers * self.moe_router_topk * weights_of_an_expert(self)

    @property
    def _besides_experts(self) -> int:
        """What every token meets."""
        layers = sum(weights_but_experts(self, has_experts) for has_experts in expert_layers(self))
        return layers + self.vocab_size * self.hidden_size


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
