"""How long a wave may take, so that running sequences do not wait too long while a context is encoded."""

from dataclasses import replace

from megatron_star.config import StarConfig
from megatron_star.plan import ContextPlan, TokenCosts

SMALLEST_WAVE_TOKENS = 128
WAVE_SHARE = 0.5
"""Of the longest wait, for the wave; the rest is for the decoding step beside it, and for a busy machine."""


class Pace:
    """Learns the seconds of a unit of cost, and cuts waves to the longest wait that is allowed."""

    def __init__(self, max_wait_seconds: float) -> None:
        self.max_wait_seconds = max_wait_seconds
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
        if self.seconds_per_cost is None:
            return star, plan
        bound = WAVE_SHARE * self.max_wait_seconds / self.seconds_per_cost
        while star.wave_tokens > SMALLEST_WAVE_TOKENS and plan.largest_wave_cost(costs) > bound:
            star = replace(star, wave_tokens=max(SMALLEST_WAVE_TOKENS, star.wave_tokens // 2))
            plan = ContextPlan.build(plan.num_tokens, plan.cp_size, star, costs)
        return star, plan
