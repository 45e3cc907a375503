"""What Star Attention cannot run, found by looking at a model and its configuration, and refused by name.

Everything that Megatron's own modules do around the core attention is kept (per-layer rotary embeddings,
output gates, norms of queries and keys, MuP's factors, experts). Refused is what the core attention itself or
Megatron's inference would do, and ours does not; and what makes a token's result depend on which other tokens
are in the same forward pass, since segments, waves and batches decide that.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_star.model.attention import StarCoreAttention, StarSelfAttention
from megatron_star.model.latent_attention import StarMLASelfAttention
from megatron_star.model.norms import AllHeadsRMSNorm, RMSNormAfterRotation
from megatron_star.model.residual import ParallelLayer, ResidualSum
from megatron_star.model.router import StarRouter
from megatron_star.model.transformer_config import OWN_FIELDS, own_field

PARALLELISM = (
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "sequence_parallel",
)
CORE_ATTENTION = (
    "experimental_attention_variant",
    "linear_attention_freq",
    "apply_query_key_layer_scaling",
    "fused_single_qkv_rope",
    "use_kitchen",
    "use_kitchen_attention",
)
OTHER_LAYERS = ("heterogeneous_block_specs", "is_hybrid_model", "mtp_num_layers")
INFERENCE = (
    "flash_decode",
    "cuda_graph_impl",
    "inference_fuse_tp_communication",
    "use_inference_optimized_layers",
    "batch_invariant_mode",
    "moe_shared_expert_overlap",
)
DEPENDS_ON_OTHER_TOKENS = (
    "fp8",
    "fp4",
    "quant_recipe",
    "moe_expert_capacity_factor",
    "moe_expert_rank_capacity_factor",
    "moe_input_jitter_eps",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
)
REFUSED = (*PARALLELISM, *CORE_ATTENTION, *OTHER_LAYERS, *INFERENCE, *DEPENDS_ON_OTHER_TOKENS)
"""Fields of Megatron's `TransformerConfig` that must have the value that they have by default."""


def _has_our_router(layer: Any) -> bool:
    return not isinstance(layer.mlp, MoELayer) or isinstance(layer.mlp.router, StarRouter)


_MODULES_OF: dict[str, Callable[[Any], bool]] = {
    "norm_placement": lambda layer: isinstance(layer.mlp_bda, ResidualSum),
    "residual_multiplier": lambda layer: isinstance(layer.mlp_bda, ResidualSum),
    "norm_bias": lambda layer: getattr(layer.input_layernorm, "bias", None) is None,
    "parallel_mlp": lambda layer: isinstance(layer, ParallelLayer),
    "qk_layernorm_span": lambda layer: isinstance(layer.self_attention.q_layernorm, AllHeadsRMSNorm),
    "qk_layernorm_after_rotation": lambda layer: isinstance(
        layer.self_attention.q_layernorm, RMSNormAfterRotation
    ),
    "add_proj_bias": lambda layer: layer.self_attention.linear_proj.bias is not None,
    "add_mlp_bias": lambda layer: isinstance(layer.mlp, MoELayer) or layer.mlp.linear_fc1.bias is not None,
    "moe_router_group_score": _has_our_router,
    "moe_router_normalised": _has_our_router,
}
"""Our fields that modules of a layer compute, and how to see that a layer has them."""

POSITION_EMBEDDINGS = ("rope", "yarn", "learned_absolute", "none")


def check_supported(config: TransformerConfig) -> None:
    """Refuse, by name, a configuration that Star Attention cannot run.

    Raises:
        ValueError: a field of `REFUSED` has another value than by default.
    """
    defaults = {field.name: field.default for field in fields(TransformerConfig)}
    for name in REFUSED:
        value = getattr(config, name)
        if value != defaults[name] and (value or defaults[name]):
            raise ValueError(f"Star Attention does not support {name}={value!r}")


def check_model(model: GPTModel) -> None:
    """Refuse, by name, a model that Star Attention cannot run.

    Raises:
        ValueError: it was built without `with_star_attention`, its configuration is not supported
            (`check_supported`), or one of its modules is not.
    """
    if not isinstance(model, GPTModel):
        raise ValueError(f"Star Attention runs Megatron's GPTModel, not {type(model).__name__}")
    check_supported(model.config)
    for obstacle in _obstacles(model):
        raise ValueError(f"Star Attention does not support {obstacle}")
    for layer in model.decoder.layers:
        attention = layer.self_attention
        has_star = isinstance(attention, StarSelfAttention | StarMLASelfAttention)
        if not (has_star and isinstance(attention.core_attention, StarCoreAttention)):
            raise ValueError(
                f"the self-attention of layer {layer.layer_number} is {type(attention).__name__}, not "
                "StarSelfAttention: build the model with a layer specification that went through "
                "megatron_star.with_star_attention"
            )


def _obstacles(model: GPTModel) -> Iterator[str]:
    """What of the model's modules and groups cannot be run."""
    if not (model.pre_process and model.post_process):
        yield "a stage of a pipeline: pre_process and post_process must be true"
    if model.mtp_process:
        yield "multi-token prediction (mtp_block_spec)"
    if model.pg_collection.cp.size() > 1:
        yield (
            f"a model whose own context-parallel group has {model.pg_collection.cp.size()} ranks: build it "
            "with pg_collection=groups.model, of megatron_star.initialize_groups"
        )
    if model.position_embedding_type not in POSITION_EMBEDDINGS:
        yield f"position_embedding_type={model.position_embedding_type!r}"
    if type(model.output_layer) is not ColumnParallelLinear:
        yield f"an output layer of {type(model.output_layer).__name__}"
    for name, is_built in _MODULES_OF.items():
        value = own_field(model.config, name)
        if value != OWN_FIELDS[name].default and not all(map(is_built, model.decoder.layers)):
            yield f"{name}={value!r} without our modules: build the model with its layer_spec"
    for layer in model.decoder.layers:
        if not hasattr(layer, "self_attention"):
            yield f"layers of {type(layer).__name__}"
        elif not isinstance(layer.cross_attention, IdentityOp):
            yield f"cross-attention ({type(layer.cross_attention).__name__})"
