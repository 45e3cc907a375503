"""The modules of a built Megatron model, made faster where they stand.

A module keeps its weights, name and state; only its class changes, to a subclass, as torch's `fully_shard`
does it. So any model can be given speed, whoever has built it and whether its weights are loaded or not.
Modules of other classes than Megatron's own and ours (TransformerEngine's) stay as they are.
"""

import importlib
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_star.model.activations import XieluMLP
from megatron_star.model.attention import StarSelfAttention
from megatron_star.model.expert_layer import StarMoELayer
from megatron_star.model.grouped_experts import StackedExperts
from megatron_star.model.norms import UnitOffsetRMSNorm
from megatron_star.speed import cache
from megatron_star.speed.elementwise import (
    CpuRMSNorm,
    CpuUnitOffsetRMSNorm,
    SwigluInPlaceMLP,
    is_plain_swiglu,
)
from megatron_star.speed.program_layer import ProgrammedLayer
from megatron_star.speed.sliced_experts import SlicedExperts, SlicedMoELayer
from megatron_star.speed.sliced_linear import DividedLinear, GatheredLinear, SummedLinear, WeightSlicing


class CachedRotation(StarSelfAttention):
    """Rotates queries and keys in pieces that a CPU's cache holds."""

    rotate = staticmethod(cache.rotate)


def speed_up_modules(model: GPTModel, device: torch.device) -> WeightSlicing:
    """Change the classes of a model's modules; what its linear layers share from then on."""
    slicing = WeightSlicing()
    for layer in model.decoder.layers:
        _become(layer, TransformerLayer, ProgrammedLayer, programs={})
        _speed_up_attention(layer.self_attention, slicing)
        shared = getattr(layer.mlp, "shared_experts", None)  # of a layer of experts
        for mlp in (layer.mlp, shared):
            if type(mlp) in (MLP, SwigluInPlaceMLP, XieluMLP, SharedExpertMLP):
                _speed_up_mlp(mlp, slicing)
        if isinstance(layer.mlp, StarMoELayer) and device.type == "cpu":
            _speed_up_experts(layer.mlp, slicing)
        if device.type == "cpu":
            _become(layer.self_attention, StarSelfAttention, CachedRotation)
            for module in layer.modules():
                _become(module, torch.nn.RMSNorm, CpuRMSNorm)
                _become(module, UnitOffsetRMSNorm, CpuUnitOffsetRMSNorm)
        if device.type == "cuda":
            _fuse_operations(layer)
    return slicing


def _fuse_operations(layer: TransformerLayer) -> None:
    """On a GPU, of which a token waits for the host that starts them."""
    fused = importlib.import_module("megatron_star.speed.cuda_modules")  # it imports Triton
    _become(layer.self_attention, StarSelfAttention, fused.FusedRotation)
    _become(layer.mlp, SwigluInPlaceMLP, fused.FusedSwigluMLP)


def _become(module: torch.nn.Module, base: type, faster: type, **attributes: Any) -> bool:
    """Make a module of the class `base` one of its subclass `faster`; whether it is one now."""
    if type(module) not in (base, faster):
        return False
    module.__class__ = faster
    for name, value in attributes.items():
        setattr(module, name, value)
    return True


def _divide(module: torch.nn.Module, base: type, faster: type, slicing: WeightSlicing, part: str) -> None:
    if _become(module, base, faster, slicing=slicing, part=part):
        slicing.layers[part].append(module)


_QUERY_KEY_VALUE = (
    "linear_qkv",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
)
"""Of an attention's linear layers, those before it: the first one, or of latent attention some of the others.
Its `linear_kv_up_proj` is absorbed into other products in token generation, which need all of its weight."""


def _speed_up_attention(attention: torch.nn.Module, slicing: WeightSlicing) -> None:
    for name in _QUERY_KEY_VALUE:
        if hasattr(attention, name):
            _divide(getattr(attention, name), ColumnParallelLinear, GatheredLinear, slicing, "qkv")
    _divide(attention.linear_proj, RowParallelLinear, SummedLinear, slicing, "proj")


def _speed_up_mlp(mlp: MLP, slicing: WeightSlicing) -> None:
    """Both of its products together: what the first one divides, only the second one can take."""
    if isinstance(mlp.linear_fc1, ColumnParallelLinear) and isinstance(mlp.linear_fc2, RowParallelLinear):
        _divide(mlp.linear_fc1, ColumnParallelLinear, DividedLinear, slicing, "mlp")
        _divide(mlp.linear_fc2, RowParallelLinear, SummedLinear, slicing, "mlp")
        if is_plain_swiglu(mlp.config):
            _become(mlp, MLP, SwigluInPlaceMLP)


def _speed_up_experts(layer: StarMoELayer, slicing: WeightSlicing) -> None:
    """Where each CP rank has all experts: others' slices are of other experts."""
    if layer.rows.are_within_cp_rank and _become(
        layer.experts, StackedExperts, SlicedExperts, slicing=slicing
    ):
        _become(layer, StarMoELayer, SlicedMoELayer)
        slicing.experts.append(layer.experts)
