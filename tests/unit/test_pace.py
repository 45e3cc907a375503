"""How long waves may be, and that everybody who plans a context plans the same."""

import pytest

from megatron_star.config import StarConfig
from megatron_star.planning.pace import CPU_WAVE_TOKENS, Pace, largest_wave_tokens
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.planner import Planner

COSTS = TokenCosts(linear_per_token=1000.0, attention_per_pair=1.0)
STAR = StarConfig(mode="star", block_size=4096, passed_keys=0)
PLAN = ContextPlan.build(32768, 2, STAR, COSTS)


def planner(device_type: str, max_wait_seconds: float) -> Planner:
    """Of two ranks on such devices."""
    return Planner(COSTS, 2, Pace(max_wait_seconds, largest_wave_tokens(device_type)))


def longest_forward_pass(plan: ContextPlan) -> int:
    return max(sum(s.num_tokens for s in wave if s.owner == rank) for wave in plan.waves for rank in (0, 1))


def test_without_a_gpu_no_rank_encodes_more_than_2k_tokens_in_a_wave():
    star, (plan,), _ = planner("cpu", float("inf")).plan(32768, STAR)
    assert longest_forward_pass(PLAN) == 16384 and len(PLAN.waves) == 1
    assert star.wave_tokens == longest_forward_pass(plan) == CPU_WAVE_TOKENS
    assert plan.num_tokens == PLAN.num_tokens and plan.mask == PLAN.mask


@pytest.mark.parametrize("wave_tokens", [512, CPU_WAVE_TOKENS])
def test_a_smaller_bound_of_the_user_stays(wave_tokens):
    star = StarConfig(mode="star", block_size=4096, passed_keys=0, wave_tokens=wave_tokens)
    assert planner("cpu", float("inf")).plan(32768, star) == (
        star,
        (ContextPlan.build(32768, 2, star, COSTS),),
        (),
    )


def test_on_a_gpu_waves_stay_as_they_are_until_one_took_too_long():
    on_gpu = planner("cuda", 2.0)
    assert on_gpu.plan(32768, STAR) == (STAR, (PLAN,), ())
    on_gpu.pace.note(PLAN.largest_wave_cost(COSTS), seconds=8.0)
    star, plan = on_gpu.bounded(STAR, PLAN)
    assert star.wave_tokens < 32768
    assert plan.largest_wave_cost(COSTS) * on_gpu.pace.seconds_per_cost <= 1.0  # half of 2 s


def test_shorter_waves_of_an_extension_are_still_on_top_of_what_it_extends():
    on_gpu = planner("cuda", 2.0)
    star, base = STAR, on_gpu.build(20000, STAR).prefix(16000)
    plan = on_gpu.build(32768, STAR, base)
    on_gpu.pace.note(plan.largest_wave_cost(COSTS), seconds=8.0)
    star, shorter = on_gpu.bounded(star, plan, base)
    assert shorter == on_gpu.build(32768, star, base) and len(shorter.waves) > len(plan.waves)


@pytest.mark.parametrize("cost", [0.0, -1.0])
def test_nothing_is_learned_from_a_wave_without_work(cost):
    pace = Pace(1.0)
    pace.note(cost, seconds=5.0)
    assert pace.seconds_per_cost is None


@pytest.mark.parametrize("mode", ["star", "exact", "auto"])
@pytest.mark.parametrize("turn_edges", [(), (700, 5000)])
def test_what_the_driver_plans_a_rank_plans_of_the_configuration_that_it_is_sent(mode, turn_edges):
    driver, rank = planner("cpu", 1.0), planner("cpu", float("inf"))
    driver.pace.note(1000.0 * 1000, seconds=1.0)
    planned = driver.plan(9001, StarConfig(mode=mode, block_size=1024), turn_edges)
    star = planned.star
    assert star.mode != "auto" and star.wave_tokens < CPU_WAVE_TOKENS
    assert rank.of_turns(planned.edges, star) == planned.plan
    earlier = rank.build(5000, StarConfig(mode="exact", wave_tokens=77)).prefix(300)
    assert rank.of_turns(planned.edges, star, earlier) == driver.build(9001, star, earlier, planned.plan.mask)
