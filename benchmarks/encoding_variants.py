"""The ways to encode a context that are compared, by name: plans, all executed by the same code."""

from dataclasses import replace

import torch

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import choose_plan
from megatron_star.planning.pace import largest_wave_tokens
from megatron_star.planning.plan import ContextPlan, Segment, Source, TokenCosts
from megatron_star.planning.sizes import ANCHOR_SIZE, recommended_passed_keys

EXACT, CONTIGUOUS, RECOMPUTE, BROADCAST = "exact", "exact, contiguous", "star, recompute", "star, broadcast"
PASSED = "star, passed"


def engine_wave_tokens(device: torch.device) -> int:
    """Tokens of a rank in a wave, as the engine has it by default."""
    return min(StarConfig().wave_tokens, largest_wave_tokens(device.type))


def variant_plan(
    name: str,
    num_tokens: int,
    cp_size: int,
    costs: TokenCosts,
    *,
    block_size: int,
    wave_tokens: int,
    anchor_size: int | None = None,
    passed_keys: int | None = None,
) -> ContextPlan:
    """The plan of a variant.

    `exact` is balanced (zigzag). `exact, contiguous` is a ring that gives each rank one stretch of the
    context, in one wave. `star, recompute` is the published system: a forward pass for each block with the
    whole anchor in front of it, block after block. `star, broadcast` is ours. `star, passed` has passed keys
    behind a small anchor: as recommended for such blocks, or of the given sizes.
    """
    config = StarConfig(block_size=block_size, wave_tokens=wave_tokens)
    if name == RECOMPUTE:
        config = replace(config, anchor="recompute", wave_tokens=block_size)
    elif name == PASSED:
        config = replace(
            config,
            anchor_size=ANCHOR_SIZE if anchor_size is None else anchor_size,
            passed_keys=recommended_passed_keys(block_size) if passed_keys is None else passed_keys,
        )
    elif name != BROADCAST:
        config = replace(config, mode="exact")
    plan = choose_plan(num_tokens, cp_size, config, costs)[1]
    return _contiguous(plan) if name == CONTIGUOUS else plan


def _contiguous(plan: ContextPlan) -> ContextPlan:
    edges = [plan.num_tokens * rank // plan.cp_size for rank in range(plan.cp_size + 1)]
    owned = tuple(Source(*edges[rank : rank + 2], rank) for rank in range(plan.cp_size))
    wave = tuple(Segment(*piece) for piece in owned)
    return replace(plan, waves=(wave,), stored=owned)
