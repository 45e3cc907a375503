"""The router of a layer of experts: which of them compute a token, and with what weights.

[tokens, E]: a score of every expert. Everything is float32, whatever the dtype of the model: in bfloat16 two
experts often have the same score, and another one than the model's own is chosen.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.model.transformer_config import own_field


class StarRouter(TopKRouter):
    """Megatron's router in float32, and what Megatron's does not compute: see `choose_experts`.

    Its weights and the bias of the choice stay float32 when the model is cast. Megatron's are cast with it,
    the bias too, which is float32 again only once its values are rounded.

    Raises:
        ValueError: the configuration describes a choice that there is not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        _check_routing(config)
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.float()
        self._is_megatrons = _megatron_computes(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        """To another device, but to no other dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def gating(self, input: Tensor) -> Tensor:
        """[..., h] -> [..., E], float32.

        Megatron's calls TransformerEngine where that is installed, on a CPU too, where it fails.
        """
        return F.linear(input.float(), self.weight, self.bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[..., E] -> the weights, zero for experts that were not chosen, and who was: both [tokens, E]."""
        if self._is_megatrons:
            return super().routing(logits, padding_mask)
        logits = logits.view(-1, self.config.num_moe_experts)
        weights, experts = choose_experts(logits, self.config, self.expert_bias)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        return torch.zeros_like(logits).scatter(1, experts, weights), chosen


def choose_experts(logits: Tensor, config: TransformerConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights; softmax and sigmoid, with all that we have fields for.

    Args:
        logits: [tokens, E], float32.
        bias: [E], float32; added to the scores for the choice only, the weights are without it.

    Returns:
        weights: [tokens, topk], float32.
        experts: [tokens, topk], int64.
    """
    scores = logits.sigmoid() if config.moe_router_score_function == "sigmoid" else logits.softmax(-1)
    experts = _best(scores if bias is None else scores + bias, config)
    weights = scores.gather(1, experts)
    normalised = own_field(config, "moe_router_normalised")
    if _megatron_normalises(config) if normalised is None else normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * (config.moe_router_topk_scaling_factor or 1.0), experts


def with_star_router(mlp: partial[Any]) -> partial[Any]:
    """Megatron's specification of a layer of experts, with our router in the place of Megatron's own."""
    submodules = mlp.keywords["submodules"]
    if submodules.router is not TopKRouter:
        return mlp
    return partial(mlp.func, **mlp.keywords | {"submodules": replace(submodules, router=StarRouter)})


def _best(scores: Tensor, config: TransformerConfig) -> Tensor:
    """[tokens, E] -> [tokens, topk], int64: the experts of the highest scores, of the best groups only."""
    topk, group_topk, num_groups = (
        config.moe_router_topk,
        config.moe_router_group_topk,
        config.moe_router_num_groups,
    )
    tokens, num_experts = scores.shape
    if not group_topk:
        return scores.topk(topk, dim=-1, sorted=False).indices
    if own_field(config, "moe_router_group_score") == "top_sum":
        return group_limited_topk(scores, topk, tokens, num_experts, num_groups, group_topk)[1]
    groups = scores.view(tokens, num_groups, -1)
    best_groups = groups.amax(-1).topk(group_topk, dim=-1, sorted=False).indices
    left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best_groups, False)
    allowed = groups.masked_fill(left_out.unsqueeze(-1), float("-inf")).view(tokens, num_experts)
    return allowed.topk(topk, dim=-1, sorted=False).indices


def _megatron_normalises(config: TransformerConfig) -> bool:
    if config.moe_router_score_function == "softmax":
        return not config.moe_router_pre_softmax
    return config.moe_router_topk > 1


def _megatron_computes(config: TransformerConfig) -> bool:
    """Whether `topk_routing_with_score_function` does what the configuration says."""
    by_max = config.moe_router_group_topk and own_field(config, "moe_router_group_score") == "max"
    softmax_with_bias = config.moe_router_score_function == "softmax" and config.moe_router_enable_expert_bias
    normalised = own_field(config, "moe_router_normalised")
    return not (by_max or softmax_with_bias) and normalised in (None, _megatron_normalises(config))


def _check_routing(config: TransformerConfig) -> None:
    topk, group_topk, score = (
        config.moe_router_topk,
        config.moe_router_group_topk,
        config.moe_router_score_function,
    )
    if group_topk:
        allowed = config.num_moe_experts // config.moe_router_num_groups * group_topk
        if topk > allowed:
            raise ValueError(f"moe_router_topk {topk} is more than the {allowed} experts of a token's groups")
        if own_field(config, "moe_router_group_score") == "top_sum" and topk < group_topk:
            raise ValueError(
                f"moe_router_topk {topk} is less than moe_router_group_topk {group_topk}: a group's score is "
                "the sum of its best moe_router_topk // moe_router_group_topk"
            )
    is_normalised = own_field(config, "moe_router_normalised")
    if is_normalised is False and score == "softmax" and not config.moe_router_pre_softmax:
        raise ValueError("moe_router_normalised=False goes with moe_router_pre_softmax only")
    if score not in ("softmax", "sigmoid") and not _megatron_computes(config):
        raise ValueError(f"moe_router_score_function={score!r} goes with what Megatron's router does only")
