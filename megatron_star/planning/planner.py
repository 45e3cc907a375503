"""The one place that turns a context's length and a configuration into plans.

The driver, the ranks, the evaluation and the estimates each ask a `Planner`. Equal questions give equal
plans, but for the waves: these also depend on what the driver's pace has learned. Knows no tensor, no process
group and no Megatron.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.planning.mask import Mask, mask_of_turns
from megatron_star.planning.model_shape import ModelShape
from megatron_star.planning.pace import SMALLEST_WAVE_TOKENS, Pace, largest_wave_tokens
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.sizes import length_for_sizes, with_sizes

MOST_LINKS = 8
"""Contexts in a chain, of which each extends the one before: in each layer and step, sequences attend to each
of them in a call of its own."""


class PlannedContext(NamedTuple):
    """How a context is encoded.

    Attributes:
        star: with its mode decided (`star` or `exact`), its sizes chosen, and the waves that it really has.
        plans: of the contexts that it is encoded as, if nothing of it is there: each extends the one before,
            and the last is the whole one (`Planner.ends`).
        turn_edges: where, in tokens, its earlier turns ended.
    """

    star: StarConfig
    plans: tuple[ContextPlan, ...]
    turn_edges: tuple[int, ...] = ()

    @property
    def plan(self) -> ContextPlan:
        """The plan of the whole context."""
        return self.plans[-1]

    @property
    def edges(self) -> tuple[int, ...]:
        """Where its turns end, the last one included."""
        return (*self.turn_edges, self.plan.num_tokens)


class Planner:
    """Plans the contexts of one model on so many ranks.

    Attributes:
        costs: of the model's tokens.
        pace: how long the ranks take, and so how long waves may be.
        keeps_turns: the first turns of a conversation have contexts of their own. One for all is enough,
            since others may extend any prefix of it; but not where layers with a mask of their own keep only
            the end of a context, or a store finds only whole ones.
    """

    def __init__(self, costs: TokenCosts, cp_size: int, pace: Pace | None = None) -> None:
        """pace: by default one that bounds nothing."""
        self.costs, self.cp_size, self.pace = costs, cp_size, pace or Pace()
        self.keeps_turns = bool(costs.attention_of_masks)

    @classmethod
    def of_model(
        cls, shape: ModelShape, *, cp_size: int, device_type: str, max_wait_seconds: float = math.inf
    ) -> Self:
        """One for a model that runs on devices of this type, `cpu` or `cuda`.

        Args:
            max_wait_seconds: between two tokens of a running sequence while another context is encoded.
        """
        return cls(token_costs(shape), cp_size, Pace(max_wait_seconds, largest_wave_tokens(device_type)))

    def plan(self, num_tokens: int, star: StarConfig, turn_edges: tuple[int, ...] = ()) -> PlannedContext:
        """How a context is encoded if nothing of it is there yet.

        Args:
            turn_edges: where, in tokens, earlier contexts ended that this one extends.
        """
        star = with_sizes(star, length_for_sizes(num_tokens, turn_edges))
        mode, plan = choose_plan(num_tokens, self.cp_size, star, self.costs)
        star, edges = replace(star, mode=mode), (*turn_edges, num_tokens)
        if turn_edges:
            plan = self.of_turns(edges, star)
        star, plan = self.bounded(star, plan)
        ends = self.ends(edges)
        plans = (plan,) if len(ends) == 1 else self.chain(ends, star, mask=plan.mask)
        return PlannedContext(star, plans, turn_edges)

    def ends(self, edges: Sequence[int], start: int = 0, most: int = MOST_LINKS) -> tuple[int, ...]:
        """Where the contexts end that what comes after `start` is encoded as, at most so many.

        edges: where turns end.
        """
        earlier = [edge for edge in edges[:-1] if edge > start] if self.keeps_turns else []
        return (*earlier[: most - 1], edges[-1])

    def chain(
        self,
        edges: Iterable[int],
        star: StarConfig,
        base: ContextPlan | None = None,
        mask: Mask | None = None,
    ) -> tuple[ContextPlan, ...]:
        """Plans of contexts that end at these rising edges: the first extends `base`, the next that, ..

        Args:
            star: of a `PlannedContext`.
            mask: of the last one; without it, each is a turn (see `ContextPlan.build`).
        """
        plans: list[ContextPlan] = []
        for num_tokens in edges:
            of_its_own = mask.prefix(num_tokens) if mask else None
            plans.append(self.build(num_tokens, star, plans[-1] if plans else base, of_its_own))
        return tuple(plans)

    def build(
        self, num_tokens: int, star: StarConfig, base: ContextPlan | None = None, mask: Mask | None = None
    ) -> ContextPlan:
        """The plan of a configuration that is used as it is; see `ContextPlan.build`.

        star: of a `PlannedContext`.
        """
        return ContextPlan.build(num_tokens, self.cp_size, star, self.costs, base, mask)

    def of_turns(
        self, edges: Sequence[int], star: StarConfig, base: ContextPlan | None = None
    ) -> ContextPlan:
        """How ranks read what the driver tells them: the plan of a context that ends at the last of these
        edges, and at the others with its turns; `base` has any first tokens of it.
        """
        return self.build(edges[-1], star, base, mask_of_turns(star, edges))

    def bounded(
        self, star: StarConfig, plan: ContextPlan, base: ContextPlan | None = None
    ) -> tuple[StarConfig, ContextPlan]:
        """The configuration and plan with waves as long as the pace allows by now, by halving `wave_tokens`.

        base: the plan that this one extends.
        """
        if star.wave_tokens > self.pace.largest_wave_tokens:
            star = replace(star, wave_tokens=self.pace.largest_wave_tokens)
            plan = self.build(plan.num_tokens, star, base, plan.mask)
        bound = self.pace.most_wave_cost()
        while star.wave_tokens > SMALLEST_WAVE_TOKENS and plan.largest_wave_cost(self.costs) > bound:
            star = replace(star, wave_tokens=max(SMALLEST_WAVE_TOKENS, star.wave_tokens // 2))
            plan = self.build(plan.num_tokens, star, base, plan.mask)
        return star, plan

    def query_token_cost(self, num_context_tokens: int) -> float:
        """Of a query token on a rank, which sees the context KV that the rank holds.

        Of a layer with a mask of its own, that is counted as if one rank held all of it.
        """
        pairs = num_context_tokens / self.cp_size
        of_masks = sum(
            per_pair * mask.most_kept(num_context_tokens) for mask, per_pair in self.costs.attention_of_masks
        )
        return self.costs.linear_per_token + self.costs.attention_per_pair * pairs + of_masks
