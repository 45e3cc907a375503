"""The plans that are compared mean what their names say."""

import pytest
import torch
from reference import star_mask

from benchmarks.encoding_variants import BROADCAST, CONTIGUOUS, EXACT, PASSED, RECOMPUTE, variant_plan
from megatron_star.planning.plan import ContextPlan, TokenCosts

SIZES = {"block_size": 10, "wave_tokens": 1000}


def visible_pairs(plan: ContextPlan) -> float:
    """Pairs of all segments, without those of anchor copies among themselves."""
    copies = sum(s.recomputed * (s.recomputed + 1) / 2 for s in plan.segments())
    return sum(segment.cost(plan.mask, TokenCosts(0.0, 1.0)) for segment in plan.segments()) - copies


@pytest.mark.parametrize("name", [EXACT, CONTIGUOUS, RECOMPUTE, BROADCAST])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_a_plan_sees_as_many_pairs_as_its_mask(name, cp_size):
    plan = variant_plan(name, 97, cp_size, TokenCosts(1.0, 0.1), **SIZES)
    exact = name in (EXACT, CONTIGUOUS)
    mask = torch.ones(97, 97).tril() if exact else star_mask(97, 10)
    assert visible_pairs(plan) == mask.sum()


def test_the_contiguous_ring_gives_each_rank_one_stretch_and_the_last_most_work():
    plan = variant_plan(CONTIGUOUS, 90, 3, TokenCosts(0.0, 1.0), **SIZES)
    assert [(s.start, s.end, s.owner) for s in plan.segments()] == [(0, 30, 0), (30, 60, 1), (60, 90, 2)]
    balanced = variant_plan(EXACT, 90, 3, TokenCosts(0.0, 1.0), **SIZES)
    assert plan.cost(TokenCosts(0.0, 1.0)) > 1.6 * balanced.cost(TokenCosts(0.0, 1.0))


def test_passed_keys_are_as_recommended_for_the_blocks_or_as_asked_for():
    costs, sizes = TokenCosts(1.0, 0.1), {"block_size": 1024, "wave_tokens": 4096}
    recommended = variant_plan(PASSED, 16 << 10, 2, costs, **sizes).mask
    assert (recommended.num_blocks, recommended.anchor_size, recommended.passed_keys) == (16, 128, 128)
    asked = variant_plan(PASSED, 16 << 10, 2, costs, **sizes, anchor_size=0, passed_keys=5).mask
    assert (asked.anchor_size, asked.passed_keys) == (0, 5)
    of_star = variant_plan(BROADCAST, 16 << 10, 2, costs, **sizes, anchor_size=0, passed_keys=5).mask
    assert (of_star.anchor_size, of_star.passed_keys) == (1024, 0)


def test_the_published_variant_encodes_a_block_a_rank_in_a_forward_pass():
    plan = variant_plan(RECOMPUTE, 100, 2, TokenCosts(1.0, 0.1), **SIZES)
    assert len(plan.waves) == 5
    assert all(s.recomputed == 10 for s in plan.segments() if s.start)
