"""How long a wave may be: on a CPU as is fastest, and never so long that running sequences wait too long."""

import sys
from dataclasses import replace

import torch

from megatron_star.config import StarConfig
from megatron_star.plan import ContextPlan, TokenCosts

SMALLEST_WAVE_TOKENS = 128
WAVE_SHARE = 0.5
"""Of the longest wait, for the wave; the rest is for the decoding step beside it, and for a busy machine."""
CPU_WAVE_TOKENS = 2048
"""Of a rank without a GPU. With more, activations exceed 32 MB, which glibc maps anew each time."""


def largest_wave_tokens(device: torch.device) -> int:
    """Tokens of a rank in one forward pass beyond which it becomes slower."""
    return CPU_WAVE_TOKENS if device.type == "cpu" else sys.maxsize


def with_fast_waves(star: StarConfig, device: torch.device) -> StarConfig:
    """The configuration, with waves no longer than `largest_wave_tokens`."""
    return replace(star, wave_tokens=min(star.wave_tokens, largest_wave_tokens(device)))


class Pace:
    """Learns the seconds of a unit of cost, and cuts waves to the longest wait that is allowed."""

    def __init__(self, max_wait_seconds: float, largest_wave_tokens: int = sys.maxsize) -> None:
        self.max_wait_seconds = max_wait_seconds
        self.largest_wave_tokens = largest_wave_tokens
        self.seconds_per_cost: float | None = None

    def note(self, cost: float, seconds: float) -> None:
        """A wave of this cost took so long. Slow waves count at once, fast ones by and by."""
        if cost <= 0:
            return
        latest = seconds / cost
        known = self.seconds_per_cost
        self.seconds_per_cost = latest if known is None else max(latest, 0.8 * known + 0.2 * latest)

    def bounded(
        self, star: StarConfig, plan: ContextPlan, costs: TokenCosts
    ) -> tuple[StarConfig, ContextPlan]:
        """The configuration and plan with waves that are as long as allowed, by halving `wave_tokens`."""
        if star.wave_tokens > self.largest_wave_tokens:
            star = replace(star, wave_tokens=self.largest_wave_tokens)
            plan = ContextPlan.build(plan.num_tokens, plan.cp_size, star, costs)
        if self.seconds_per_cost is None:
            return star, plan
        bound = WAVE_SHARE * self.max_wait_seconds / self.seconds_per_cost
        while star.wave_tokens > SMALLEST_WAVE_TOKENS and plan.largest_wave_cost(costs) > bound:
            star = replace(star, wave_tokens=max(SMALLEST_WAVE_TOKENS, star.wave_tokens // 2))
            plan = ContextPlan.build(plan.num_tokens, plan.cp_size, star, costs)
        return star, plan
