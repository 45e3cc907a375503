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
from megatron_star.model.experts import with_biases_added_once
from megatron_star.model.norms import (
    AllHeadsRMSNorm,
    L2Norm,
    is_megatrons_norm,
    norm,
    rms_norm_after_rotation,
)
from megatron_star.model.residual import ParallelLayer, ResidualSum
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
    _add_biases(parts, config, with_experts)
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
    for name, value in _NOT_WITH_TRANSFORMER_ENGINE.items():
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


def _add_biases(parts: TransformerLayerSubmodules, config: TransformerConfig, with_experts: bool) -> None:
    attention = parts.self_attention.submodules
    if own_field(config, "add_proj_bias"):
        attention.linear_proj = _with_bias(attention.linear_proj)
    if own_field(config, "add_mlp_bias"):
        linears = parts.mlp.keywords["submodules"]
        with_biases = replace(
            linears, linear_fc1=_with_bias(linears.linear_fc1), linear_fc2=_with_bias(linears.linear_fc2)
        )
        parts.mlp = partial(parts.mlp.func, submodules=with_biases)
    if with_experts and config.add_bias_linear:
        parts.mlp = with_biases_added_once(parts.mlp)


def _with_bias(build: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """What builds a linear layer, with a bias whatever Megatron asks for."""

    def build_with_bias(*args: Any, **options: Any) -> torch.nn.Module:
        return build(*args, **options | {"bias": True})

    return build_with_bias
