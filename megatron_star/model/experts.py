"""Biases of experts at any tensor-parallel size."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules


def with_biases_added_once(mlp: partial) -> partial:
    """The specification of experts whose biases are added by one tensor-parallel rank.

    Each rank computes a part of an expert's output. Megatron's experts add the bias to it before the parts
    are summed over the ranks, and so have biases only where one rank has the whole expert.

    Args:
        mlp: Megatron's specification of a layer of experts that are computed one after the other.
    """
    submodules: MoESubmodules = mlp.keywords["submodules"]
    linears = submodules.experts.keywords["submodules"]
    linears = replace(linears, linear_fc2=_with_bias_on_first_rank(linears.linear_fc2))
    experts = partial(submodules.experts.func, submodules=linears)
    return partial(mlp.func, submodules=replace(submodules, experts=experts))


def _with_bias_on_first_rank(build: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Builds what `build` does: a linear layer that returns its output and, on later ranks no, bias."""

    def build_with_bias_on_first_rank(*sizes: int, tp_group: Any, **options: Any) -> torch.nn.Module:
        linear = build(*sizes, tp_group=tp_group, **options)
        if tp_group.rank() > 0:
            linear.register_forward_hook(lambda module, inputs, returned: (returned[0], None))
        return linear

    return build_with_bias_on_first_rank
