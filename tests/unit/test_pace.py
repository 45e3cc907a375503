"""How long waves may be."""

import math

import pytest
import torch

from megatron_star.config import StarConfig
from megatron_star.planning.pace import CPU_WAVE_TOKENS, Pace, largest_wave_tokens, with_fast_waves
from megatron_star.planning.plan import ContextPlan, TokenCosts

COSTS = TokenCosts(linear_per_token=1000.0, attention_per_pair=1.0)
STAR = StarConfig(mode="star", block_size=4096)
PLAN = ContextPlan.build(32768, 2, STAR, COSTS)


def longest_forward_pass(plan: ContextPlan) -> int:
    return max(sum(s.num_tokens for s in wave if s.owner == rank) for wave in plan.waves for rank in (0, 1))


def test_without_a_gpu_no_rank_encodes_more_than_2k_tokens_in_a_wave():
    pace = Pace(math.inf, largest_wave_tokens(torch.device("cpu")))
    star, plan = pace.bounded(STAR, PLAN, COSTS)
    assert longest_forward_pass(PLAN) == 16384 and len(PLAN.waves) == 1
    assert star.wave_tokens == longest_forward_pass(plan) == CPU_WAVE_TOKENS
    assert plan.num_tokens == PLAN.num_tokens and plan.mask == PLAN.mask


def test_a_smaller_bound_of_the_user_stays():
    star = StarConfig(mode="star", block_size=4096, wave_tokens=512)
    plan = ContextPlan.build(32768, 2, star, COSTS)
    assert Pace(math.inf, CPU_WAVE_TOKENS).bounded(star, plan, COSTS) == (star, plan)


def test_on_a_gpu_waves_stay_as_they_are_until_one_took_too_long():
    pace = Pace(2.0, largest_wave_tokens(torch.device("cuda")))
    assert pace.bounded(STAR, PLAN, COSTS) == (STAR, PLAN)
    pace.note(PLAN.largest_wave_cost(COSTS), seconds=8.0)
    star, plan = pace.bounded(STAR, PLAN, COSTS)
    assert star.wave_tokens < 32768
    assert plan.largest_wave_cost(COSTS) * pace.seconds_per_cost <= 1.0  # half of 2 s


@pytest.mark.parametrize("cost", [0.0, -1.0])
def test_nothing_is_learned_from_a_wave_without_work(cost):
    pace = Pace(1.0)
    pace.note(cost, seconds=5.0)
    assert pace.seconds_per_cost is None


@pytest.mark.parametrize(
    ("device", "asked", "given"), [("cpu", 32768, CPU_WAVE_TOKENS), ("cpu", 512, 512), ("cuda", 32768, 32768)]
)
def test_plans_outside_the_engine_have_waves_as_in_it(device, asked, given):
    star = StarConfig(wave_tokens=asked)
    assert with_fast_waves(star, torch.device(device)).wave_tokens == given
