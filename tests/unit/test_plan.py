"""The plan implies exactly the mask of the definition, and shares the work evenly."""

import random

import pytest
import torch
from reference import star_mask

from megatron_star.config import StarConfig
from megatron_star.planning.plan import ContextPlan, Segment, TokenCosts
from megatron_star.planning.reads import wave_reads

COSTS = TokenCosts(linear_per_token=3000.0, attention_per_pair=1.0)


def mask_of(plan: ContextPlan) -> torch.Tensor:
    """[n, n] bool: what the plan's segments see."""
    mask = torch.zeros(plan.num_tokens, plan.num_tokens, dtype=torch.bool)
    for segment in plan.segments():
        rows = slice(segment.start, segment.end)
        mask[rows, : segment.recomputed] = True
        mask[rows, rows] = torch.ones(segment.num_tokens, segment.num_tokens, dtype=torch.bool).tril()
        for source in segment.sources(plan.mask):
            assert not mask[rows, source.start : source.end].any(), "a key would count twice"
            mask[rows, source.start : source.end] = True
    return mask


def random_cases(count: int) -> list[tuple[int, int, StarConfig]]:
    rng = random.Random(0)
    cases = []
    for _ in range(count):
        n = rng.choice([0, 1, 2, 7, 37, 64, 97, 128, rng.randrange(200)])
        config = StarConfig(
            mode=rng.choice(["star", "star", "star", "exact"]),
            block_size=rng.choice([1, 3, 8, 16, 50, 300]),
            anchor_size=rng.choice([None, 0, 1, 5, 16, 1000]),
            neighbor_blocks=rng.choice([0, 0, 1, 2]),
            anchor=rng.choice(["broadcast", "recompute"]),
            wave_tokens=rng.choice([1, 7, 16, 1000]),
        )
        cases.append((n, rng.choice([1, 2, 3, 4, 7]), config))
    return cases


@pytest.mark.parametrize("case", random_cases(400))
def test_the_plan_implies_the_mask_of_the_definition(case):
    n, cp_size, config = case
    block_size = max(1, n) if config.mode == "exact" else config.block_size

    plan = ContextPlan.build(n, cp_size, config, COSTS)

    assert torch.equal(mask_of(plan), star_mask(n, block_size, config.anchor_size, config.neighbor_blocks))
    segments = list(plan.segments())
    assert [s.start for s in segments[1:]] == [s.end for s in segments[:-1]]
    assert sum(plan.num_owned_tokens(rank) for rank in range(cp_size)) == n
    assert all(s.num_tokens > 0 and 0 <= s.owner < cp_size for s in segments)


@pytest.mark.parametrize("case", random_cases(400))
def test_no_rank_encodes_more_than_wave_tokens_in_a_wave(case):
    n, cp_size, config = case
    for wave in ContextPlan.build(n, cp_size, config, COSTS).waves:
        for rank in range(cp_size):
            assert sum(s.num_tokens for s in wave if s.owner == rank) <= config.wave_tokens


@pytest.mark.parametrize("case", random_cases(200))
def test_reads_cover_each_segments_sources_once_and_all_ranks_agree_on_the_transfers(case):
    n, cp_size, config = case
    plan = ContextPlan.build(n, cp_size, config, COSTS)
    for wave in plan.waves:
        reads = [wave_reads(plan, wave, rank) for rank in range(cp_size)]
        transfers = [[r.source for r in of_rank if r.crosses_ranks] for of_rank in reads]
        assert all(t == transfers[0] for t in transfers)
        for rank in range(cp_size):
            assert _seen_by_rows(reads[rank]) == _wanted_by_rows(plan, wave, rank)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["exact", "star"])
def test_no_read_reaches_over_the_end_of_a_plan_that_is_extended(cp_size, mode):
    """The tokens of each plan are in storage of its own."""
    config = StarConfig(mode=mode, block_size=16, neighbor_blocks=2, wave_tokens=16)
    first = ContextPlan.build(64, cp_size, config, COSTS)
    second = ContextPlan.build(100, cp_size, config, COSTS, first)
    third = ContextPlan.build(160, cp_size, config, COSTS, second)
    sources = [
        r.source for wave in third.waves for rank in range(cp_size) for r in wave_reads(third, wave, rank)
    ]
    assert not [s for s in sources if s.start < 64 < s.end or s.start < 100 < s.end]


def test_neighbouring_sources_of_a_rank_are_sent_as_one():
    """In zigzag order, rank 0 has the last piece of a wave and the first of the next one."""
    plan = ContextPlan.build(160, 2, StarConfig(mode="exact", wave_tokens=20), COSTS)
    crossing = [r.source[:2] for r in wave_reads(plan, plan.waves[-1], 1) if r.crosses_ranks]
    assert crossing[:3] == [(0, 10), (10, 30), (30, 50)]


@pytest.mark.parametrize("cp_size", [40, 64, 128, 1000])
@pytest.mark.parametrize("num_blocks", [4, 13, 32])
def test_many_ranks_share_a_block_in_teams_and_send_few_sources(cp_size, num_blocks):
    config = StarConfig(block_size=32768, wave_tokens=65536)
    plan = ContextPlan.build(32768 * num_blocks, cp_size, config, COSTS)
    (wave,) = plan.waves
    average = sum(s.cost(plan.mask, COSTS) for s in wave) / cp_size
    assert plan.cost(COSTS) <= 1.15 * average
    assert len([r for r in wave_reads(plan, wave, 0) if r.crosses_ranks]) <= 8 * max(cp_size, num_blocks)


def _seen_by_rows(reads) -> set[tuple[int, int]]:
    pairs = [
        (row, token)
        for read in reads
        for first, last in read.rows
        for row in range(first, last)
        for token in range(read.source.start, read.source.end)
    ]
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def _wanted_by_rows(plan: ContextPlan, wave: tuple[Segment, ...], rank: int) -> set[tuple[int, int]]:
    pairs, offset = set(), 0
    for segment in wave:
        if segment.owner == rank:
            first = offset + segment.recomputed
            rows = range(first, first + segment.num_tokens)
            for s in segment.sources(plan.mask):
                pairs |= {(row, token) for row in rows for token in range(s.start, s.end)}
            offset = first + segment.num_tokens
    return pairs


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 8, 13, 16, 32])
@pytest.mark.parametrize("mode", ["star", "exact"])
def test_the_slowest_rank_costs_little_more_than_the_average(cp_size, num_blocks, mode):
    n = 1024 * num_blocks
    plan = ContextPlan.build(n, cp_size, StarConfig(mode=mode, block_size=1024), COSTS)
    average = sum(s.cost(plan.mask, COSTS) for s in plan.segments()) / cp_size
    assert plan.cost(COSTS) <= 1.12 * average


def test_exact_mode_gives_each_rank_its_zigzag_pair():
    plan = ContextPlan.build(80, 4, StarConfig(mode="exact"), COSTS)
    owners = {(s.start, s.end): s.owner for s in plan.segments()}
    assert owners == {
        (0, 10): 0,
        (10, 20): 1,
        (20, 30): 2,
        (30, 50): 3,
        (50, 60): 2,
        (60, 70): 1,
        (70, 80): 0,
    }


@pytest.mark.parametrize(("num_blocks", "cp_size"), [(8, 2), (16, 2), (12, 4), (6, 3)])
def test_only_the_anchor_crosses_ranks_when_blocks_are_whole(num_blocks, cp_size):
    config = StarConfig(block_size=1000, anchor_size=700)
    plan = ContextPlan.build(num_blocks * 1000, cp_size, config, COSTS)
    for rank in range(cp_size):
        crossing = [r.source[:2] for r in wave_reads(plan, plan.waves[0], rank) if r.crosses_ranks]
        assert crossing == [(0, 700)]


def test_recompute_sends_nothing_when_blocks_are_whole():
    plan = ContextPlan.build(8000, 2, StarConfig(block_size=1000, anchor="recompute"), COSTS)
    assert not any(read.crosses_ranks for rank in range(2) for read in wave_reads(plan, plan.waves[0], rank))
    assert [s.recomputed for s in plan.segments()] == [0] + [1000] * 7


def test_a_whole_context_in_one_wave_makes_one_segment_a_block():
    plan = ContextPlan.build(8000, 2, StarConfig(block_size=1000), COSTS)
    assert [s.num_tokens for s in plan.segments()] == [1000] * 8
    assert [s.owner for s in plan.segments()] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("mode", ["exact", "star"])
def test_a_plan_of_ten_million_tokens_in_short_waves_is_small(mode):
    """Nothing is kept for each pair of a segment and what it sees: those were 4 billion."""
    plan = ContextPlan.build(
        10_000_000, 8, StarConfig(mode=mode, block_size=32 << 10, wave_tokens=2048), COSTS
    )
    assert len(plan.stored) <= sum(map(len, plan.waves)) <= 15 * len(plan.waves)
    assert all(len(segment.sources(plan.mask)) <= 2 for segment in plan.segments())
    assert len(wave_reads(plan, plan.waves[-1], 0)) <= len(plan.stored)


@pytest.mark.parametrize("mode", ["exact", "star"])
def test_more_than_two_thousand_ranks_share_the_work(mode):
    plan = ContextPlan.build(4_000_000, 4096, StarConfig(mode=mode, block_size=32 << 10), COSTS)
    average = sum(s.cost(plan.mask, COSTS) for s in plan.segments()) / 4096
    assert plan.cost(COSTS) <= 1.12 * average
    assert min(plan.owned_tokens) > 0
