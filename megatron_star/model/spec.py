"""Swap Star Attention into a Megatron layer specification, whatever else the specification holds."""

from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_star.model.attention import StarCoreAttention, StarSelfAttention


def with_star_attention(spec: Any) -> Any:
    """A copy of a layer or block specification in which every SelfAttention is a StarSelfAttention.

    Raises:
        ValueError: the specification holds an attention that Star Attention does not support.
    """
    if isinstance(spec, list | tuple):
        return type(spec)(with_star_attention(item) for item in spec)
    if isinstance(spec, ModuleSpec) and spec.module is SelfAttention:
        swapped = copy(spec)
        swapped.module = StarSelfAttention
        swapped.submodules = copy(spec.submodules)
        swapped.submodules.core_attention = StarCoreAttention
        return swapped
    if isinstance(spec, ModuleSpec) and isinstance(spec.module, type) and issubclass(spec.module, Attention):
        raise ValueError(f"Star Attention does not support layers of {spec.module.__name__}")
    if is_dataclass(spec) and not isinstance(spec, type):
        swapped = copy(spec)
        for field in fields(spec):
            setattr(swapped, field.name, with_star_attention(getattr(spec, field.name)))
        return swapped
    return spec
