"""Swap our modules into a Megatron layer specification, whatever else the specification holds."""

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_star.model.attention import StarCoreAttention, StarSelfAttention
from megatron_star.speed.elementwise import CpuRMSNorm, SwigluInPlace
from megatron_star.speed.program_layer import StarTransformerLayer
from megatron_star.speed.sliced_linear import DividedLinear, GatheredLinear, SummedLinear, WeightSlicing


def with_star_attention(spec: Any) -> Any:
    """A copy of a layer or block specification in which every SelfAttention is a StarSelfAttention.

    Raises:
        ValueError: the specification holds an attention that Star Attention does not support.
    """
    return _swapped(spec, _star_attention)


def with_programs(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a layer's specification whose layer can be given compiled programs.

    Layers of other classes than Megatron's TransformerLayer stay as they are.
    """
    swapped = copy(spec)
    if spec.module is TransformerLayer:
        swapped.module = StarTransformerLayer
    return swapped


def with_sliced_weights(spec: Any, slicing: WeightSlicing) -> Any:
    """A copy of a layer or block specification whose linear layers can be sliced over CP ranks.

    Only Megatron's own linear layers of attention and dense MLPs are swapped. TransformerEngine's layers and
    those of experts stay as they are, and are read whole.
    """
    return _swapped(spec, partial(_sliced_weights, slicing=slicing))


def with_swiglu_in_place(spec: Any) -> Any:
    """A copy of a specification of layers with plain SwiGLU, which they then compute in place.

    Only for Megatron's own MLP, which asks for it by `use_te_activation_func` in its configuration.
    """
    return _swapped(spec, _swiglu_in_place)


def with_cpu_rms_norms(spec: Any) -> Any:
    """A copy of a specification of layers whose norms are torch's RMSNorm, for a machine without a GPU."""
    return _swapped(spec, lambda item: CpuRMSNorm if item is WrappedTorchNorm else None)


def _swapped(spec: Any, swap: Callable[[Any], Any]) -> Any:
    """A copy of a specification with what `swap` makes of its items; None from it goes on inside the item."""
    if isinstance(spec, list | tuple):
        return type(spec)(_swapped(item, swap) for item in spec)
    swapped = swap(spec)
    if swapped is None and is_dataclass(spec) and not isinstance(spec, type):
        swapped = copy(spec)
        for field in fields(spec):
            setattr(swapped, field.name, _swapped(getattr(spec, field.name), swap))
    return spec if swapped is None else swapped


def _star_attention(spec: Any) -> Any:
    if isinstance(spec, ModuleSpec) and spec.module is SelfAttention:
        swapped = copy(spec)
        swapped.module = StarSelfAttention
        swapped.submodules = copy(spec.submodules)
        swapped.submodules.core_attention = StarCoreAttention
        return swapped
    if isinstance(spec, ModuleSpec) and isinstance(spec.module, type) and issubclass(spec.module, Attention):
        raise ValueError(f"Star Attention does not support layers of {spec.module.__name__}")
    return None


def _swiglu_in_place(spec: Any) -> Any:
    if isinstance(spec, partial) and spec.func == MLP.as_mlp_submodule:
        submodules = copy(spec.keywords["submodules"])
        submodules.activation_func = SwigluInPlace
        return partial(spec.func, *spec.args, **spec.keywords | {"submodules": submodules})
    return None


def _sliced_weights(spec: Any, slicing: WeightSlicing) -> Any:
    if isinstance(spec, ModuleSpec) and spec.module is StarSelfAttention:
        swapped = copy(spec)
        swapped.submodules = copy(spec.submodules)
        if spec.submodules.linear_qkv is ColumnParallelLinear:
            swapped.submodules.linear_qkv = partial(GatheredLinear, slicing=slicing, part="qkv")
        if spec.submodules.linear_proj is RowParallelLinear:
            swapped.submodules.linear_proj = partial(SummedLinear, slicing=slicing, part="proj")
        return swapped
    if isinstance(spec, partial) and spec.func == MLP.as_mlp_submodule:
        submodules = copy(spec.keywords["submodules"])
        if (submodules.linear_fc1, submodules.linear_fc2) == (ColumnParallelLinear, RowParallelLinear):
            submodules.linear_fc1 = partial(DividedLinear, slicing=slicing, part="mlp")
            submodules.linear_fc2 = partial(SummedLinear, slicing=slicing, part="mlp")
        return partial(spec.func, *spec.args, **spec.keywords | {"submodules": submodules})
    return None
