"""Swap our modules into a Megatron layer specification, whatever else the specification holds."""

from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_star.model.attention import StarCoreAttention, StarSelfAttention
from megatron_star.model.expert_layer import StarMoELayer
from megatron_star.model.latent_attention import StarMLASelfAttention

_SWAPPED = {SelfAttention: StarSelfAttention, MLASelfAttention: StarMLASelfAttention}

PLAIN_CORE_ATTENTIONS = ("DotProductAttention", "TEDotProductAttention")
"""Of Megatron: what `StarCoreAttention` computes. By name, since TransformerEngine's may not be installed."""


def with_star_attention(spec: Any) -> Any:
    """A copy of a layer or block specification in which every SelfAttention is a StarSelfAttention.

    Every MLASelfAttention is a StarMLASelfAttention in it, and every MoELayer a StarMoELayer.

    Raises:
        ValueError: the specification holds an attention, or experts, that Star Attention does not support.
    """
    if isinstance(spec, list | tuple):
        return type(spec)(map(with_star_attention, spec))
    swapped = _star_attention(spec) or _star_experts(spec)
    if swapped is None and is_dataclass(spec) and not isinstance(spec, type):
        swapped = copy(spec)
        for field in fields(spec):
            setattr(swapped, field.name, with_star_attention(getattr(spec, field.name)))
    return spec if swapped is None else swapped


def _star_attention(spec: Any) -> ModuleSpec | None:
    """What an item of a specification is swapped for; None goes on inside the item."""
    if not (isinstance(spec, ModuleSpec) and isinstance(spec.module, type)):
        return None
    if spec.module in _SWAPPED:
        core = getattr(spec.submodules.core_attention, "module", spec.submodules.core_attention)
        name = getattr(core, "__name__", type(core).__name__)
        if name not in PLAIN_CORE_ATTENTIONS:
            raise ValueError(f"Star Attention does not support a core attention of {name}")
        swapped = copy(spec)
        swapped.module = _SWAPPED[spec.module]
        swapped.submodules = copy(spec.submodules)
        swapped.submodules.core_attention = StarCoreAttention
        return swapped
    if issubclass(spec.module, Attention) and spec.module not in _SWAPPED.values():
        raise ValueError(f"Star Attention does not support layers of {spec.module.__name__}")
    return None


def _star_experts(spec: Any) -> ModuleSpec | partial | None:
    """What a specification of a layer of experts is swapped for; Megatron has it in either form."""
    module = getattr(spec, "func", getattr(spec, "module", None))
    if not (isinstance(module, type) and issubclass(module, MoELayer)):
        return None
    if module not in (MoELayer, StarMoELayer):
        raise ValueError(f"Star Attention does not support experts of {module.__name__}")
    if isinstance(spec, partial):
        return partial(StarMoELayer, *spec.args, **spec.keywords)
    swapped = copy(spec)
    swapped.module = StarMoELayer
    return swapped
