"""Megatron's specification of a model's layers, with our modules where the configuration asks for them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_star.model.activations import XieluMLP
from megatron_star.model.grouped_experts import check_latent_experts, with_stacked_experts
from megatron_star.model.norms import (
    AllHeadsRMSNorm,
    L2Norm,
    is_megatrons_norm,
    norm,
    rms_norm_after_rotation,
)
from megatron_star.model.residual import ParallelLayer, ResidualSum
from megatron_star.model.router import with_star_router
from megatron_star.model.transformer_config import own_field
from megatron_star.planning.expert_layers import expert_layers

TRANSFORMER_IMPLEMENTATIONS = ("local", "transformer_engine")
_NOT_WITH_TRANSFORMER_ENGINE = {"norm_placement": "after", "norm_bias": False, "parallel_mlp": True}
"""Its linear layers contain the norm before them, which has a bias where it is a LayerNorm."""


def layer_spec(
    config: TransformerConfig, transformer_impl: str, groups: ProcessGroupCollection
) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of all layers for this configuration; `transformer_impl` as Megatron names it.

    A specification of one layer is enough for layers of TransformerEngine that are all alike. Otherwise
    Megatron would take the final norm of TransformerEngine or apex where they are installed, so the norm
    comes with the layers.

    Raises:
        ValueError: TransformerEngine's modules cannot compute what a field says.
    """
    is_local = transformer_impl == "local"
    if not is_local:
        _check_transformer_engine(config)
    layers = expert_layers(config)
    by_kind = {kind: _one_layer(config, transformer_impl, groups, kind) for kind in set(layers)}
    if not is_local and len(by_kind) == 1:
        return by_kind[layers[0]]
    return TransformerBlockSubmodules(
        [by_kind[kind] for kind in layers], layer_norm=_final_norm(config, is_local)
    )


def _one_layer(
    config: TransformerConfig, transformer_impl: str, groups: ProcessGroupCollection, with_experts: bool
) -> ModuleSpec:
    """The specification of a layer with experts, or with one MLP."""
    spec = _megatrons_spec(config, transformer_impl, with_experts)
    parts: TransformerLayerSubmodules = spec.submodules
    _place_norms(parts, config, transformer_impl == "local")
    _place_qk_norms(parts.self_attention.submodules, config, groups)
    _place_latent_norms(parts.self_attention.submodules, config)
    _add_biases(parts, config)
    if with_experts:
        check_latent_experts(config)
        parts.mlp = with_stacked_experts(with_star_router(parts.mlp))
    if own_field(config, "norm_placement") != "before" or own_field(config, "residual_multiplier") != 1.0:
        parts.self_attn_bda = parts.mlp_bda = ModuleSpec(ResidualSum, {"config": config})
    if own_field(config, "parallel_mlp"):
        spec.module, parts.pre_mlp_layernorm = ParallelLayer, IdentityOp
    if own_field(config, "activation") == "xielu":
        parts.mlp = partial(XieluMLP.as_mlp_submodule, **parts.mlp.keywords)
    return spec


def _final_norm(config: TransformerConfig, is_local: bool) -> Callable[..., torch.nn.Module]:
    if not is_local:
        return TENorm
    if not is_megatrons_norm(config):
        return norm
    return LocalSpecProvider().layer_norm(rms_norm=config.normalization == "RMSNorm")


def _megatrons_spec(config: TransformerConfig, transformer_impl: str, with_experts: bool) -> ModuleSpec:
    options = {
        "num_experts": config.num_moe_experts if with_experts else None,
        "moe_grouped_gemm": config.moe_grouped_gemm and with_experts,
        "qk_layernorm": config.qk_layernorm,
        "qk_l2_norm": config.qk_l2_norm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**options)
    return get_gpt_layer_local_spec(normalization=config.normalization, **options)


def _check_transformer_engine(config: TransformerConfig) -> None:
    epsilon = own_field(config, "latent_norm_epsilon")
    not_computed = _NOT_WITH_TRANSFORMER_ENGINE | ({"latent_norm_epsilon": epsilon} if epsilon else {})
    for name, value in not_computed.items():
        if own_field(config, name) == value:
            raise ValueError(
                f"TransformerEngine's layers do not compute {name}={value!r}: use the transformer "
                "implementation local"
            )


def _place_norms(parts: TransformerLayerSubmodules, config: TransformerConfig, is_local: bool) -> None:
    """Those of the residual stream that stand before attention and MLP, and of a head's query and key."""
    if is_local and not is_megatrons_norm(config):
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
        if config.qk_layernorm and not config.multi_latent_attention:
            attention = parts.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    if own_field(config, "norm_placement") == "after":
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp


def _place_qk_norms(
    attention: SelfAttentionSubmodules, config: TransformerConfig, groups: ProcessGroupCollection
) -> None:
    if config.qk_l2_norm:
        attention.q_layernorm = attention.k_layernorm = L2Norm
    if not config.qk_layernorm or config.multi_latent_attention:
        return
    if own_field(config, "qk_layernorm_span") == "all_heads":
        build = partial(AllHeadsRMSNorm, groups=groups)
        attention.q_layernorm = partial(build, num_heads=config.num_attention_heads)
        attention.k_layernorm = partial(build, num_heads=config.num_query_groups)
    elif own_field(config, "qk_layernorm_after_rotation"):
        attention.q_layernorm = attention.k_layernorm = rms_norm_after_rotation


def _place_latent_norms(attention: SelfAttentionSubmodules, config: TransformerConfig) -> None:
    epsilon = own_field(config, "latent_norm_epsilon")
    if epsilon is not None:
        attention.q_layernorm = _always(attention.q_layernorm, eps=epsilon)
        attention.kv_layernorm = _always(attention.kv_layernorm, eps=epsilon)
    if config.multi_latent_attention and config.q_lora_rank is None:
        attention.q_layernorm = IdentityOp


def _add_biases(parts: TransformerLayerSubmodules, config: TransformerConfig) -> None:
    attention = parts.self_attention.submodules
    if own_field(config, "add_proj_bias"):
        attention.linear_proj = _always(attention.linear_proj, bias=True)
    if own_field(config, "add_mlp_bias"):
        linears = parts.mlp.keywords["submodules"]
        with_biases = replace(
            linears,
            linear_fc1=_always(linears.linear_fc1, bias=True),
            linear_fc2=_always(linears.linear_fc2, bias=True),
        )
        parts.mlp = partial(parts.mlp.func, submodules=with_biases)


def _always(build: Callable[..., torch.nn.Module], **options: Any) -> Callable[..., torch.nn.Module]:
    """What builds a module with these options, whatever Megatron asks for."""

    def build_so(*args: Any, **asked_for: Any) -> torch.nn.Module:
        return build(*args, **asked_for | options)

    return build_so
