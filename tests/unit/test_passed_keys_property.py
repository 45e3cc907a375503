"""What plans say of passed keys is the definition, token by token, for hundreds of random contexts.

A key is known here by who names it: (block, place in the order of what the block names).
"""

import random
from collections.abc import Iterator

import pytest
from reference import PassingBlocks

from megatron_star.config import StarConfig
from megatron_star.planning.mask import Range, StarMask, mask_of, most_sources
from megatron_star.planning.passing import WavePassing, wave_passing
from megatron_star.planning.plan import ContextPlan, Segment, TokenCosts, Wave

PAIRS = TokenCosts(linear_per_token=0.0, attention_per_pair=1.0)
COSTS = TokenCosts(linear_per_token=300.0, attention_per_pair=1.0)
Key = tuple[int, int]


def random_cases(count: int) -> list[tuple[tuple[int, ...], int, StarConfig]]:
    """Turns, number of ranks and configuration."""
    rng = random.Random(1)
    cases = []
    for _ in range(count):
        n = rng.choice([1, 2, 7, 37, 64, 97, 128, 251, rng.randrange(1, 300)])
        turns = tuple(sorted(rng.sample(range(1, n), min(n - 1, rng.choice([0, 0, 0, 1, 2])))))
        config = StarConfig(
            block_size=rng.choice([1, 3, 8, 16, 50, 300]),
            anchor_size=rng.choice([None, 0, 1, 5, 16, 1000]),
            neighbor_blocks=rng.choice([0, 0, 1, 2]),
            passed_keys=rng.choice([1, 2, 3, 5, 8, 64, 1000]),
            wave_tokens=rng.choice([1, 7, 16, 1000]),
        )
        cases.append(((*turns, n), rng.choice([1, 2, 3, 4, 7]), config))
    return cases


CASES = random_cases(250)


def passed_to(blocks: PassingBlocks, block: int) -> tuple[tuple[int, int], ...]:
    """What a block sees of earlier ones' named keys: the block, and how many."""
    seen = ((earlier, blocks.num_seen(block, earlier)) for earlier in range(blocks.first_whole(block)))
    return tuple((earlier, num_keys) for earlier, num_keys in seen if num_keys)


def keys_seen(blocks: PassingBlocks, token: int) -> set[Key]:
    passed = passed_to(blocks, blocks.block_of(token))
    return {(earlier, place) for earlier, num_keys in passed for place in range(num_keys)}


def waves_of(plans: tuple[ContextPlan, ...]) -> Iterator[tuple[ContextPlan, Wave, WavePassing]]:
    for plan in plans:
        for wave in plan.waves:
            yield plan, wave, wave_passing(plan, wave)


def keys_that_arrive(passing: WavePassing, segment: Segment) -> list[Key]:
    """What a segment finds in the rows that it takes of what the ranks send: padding is there, too."""
    received: dict[tuple[int, int], Key] = {}
    for sent in passing.sent:
        for place in range(sent.num_keys):
            assert (sent.owner, sent.row + place) not in received, "two keys in one row"
            received[sent.owner, sent.row + place] = sent.block, place
    return [received[rank, row] for rank, rows in passing.rows(segment) for row in range(*rows)]


@pytest.mark.parametrize("case", CASES)
def test_masks_pass_what_the_definition_says(case):
    turns, cp_size, config = case
    blocks, plans = PassingBlocks.of(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    assert list(plans[-1].mask.block_edges) == blocks.edges
    for plan in plans:
        mask = plan.mask
        assert isinstance(mask, StarMask)
        for block in range(mask.num_blocks):
            passed, (start, end) = passed_to(blocks, block), blocks.edges[block : block + 2]
            assert mask.passed(start) == mask.passed(end - 1) == passed
            assert mask.num_passed(start) == sum(num_keys for _, num_keys in passed)
            assert mask.num_named(block) == blocks.num_named(block)
        for segment in plan.segments():
            block = blocks.block_of(segment.start)
            whole = Range(blocks.edges[blocks.first_whole(block)], segment.start)
            assert segment.end <= blocks.edges[block + 1]
            assert segment.sources(mask) == ((whole,) if whole.start < whole.end else ())


@pytest.mark.parametrize("case", CASES)
def test_the_work_of_a_plan_is_the_number_of_visible_pairs(case):
    turns, cp_size, config = case
    blocks, plans = PassingBlocks.of(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    for plan in plans:
        pairs = 0
        for block in range(blocks.block_of(plan.start), plan.mask.num_blocks):
            start, end = blocks.edges[block : block + 2]
            before = start - blocks.edges[blocks.first_whole(block)]
            before += sum(num_keys for _, num_keys in passed_to(blocks, block))
            pairs += sum(before + token + 1 - start for token in range(start, end))
        assert sum(segment.cost(plan.mask, PAIRS) for segment in plan.segments()) == pairs


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_named_once_by_a_rank_that_has_seen_all_of_it(case):
    turns, cp_size, config = case
    blocks, plans = PassingBlocks.of(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    named_blocks = []
    for plan, wave, passing in waves_of(plans):
        for named in passing.named:
            assert named.tokens == tuple(blocks.edges[named.block : named.block + 2])
            (last,) = (segment for segment in wave if segment.end == named.tokens.end)
            assert last.owner == named.owner
            seen = {*range(last.start, last.end), *(t for r in last.sources(plan.mask) for t in range(*r))}
            assert seen >= {*range(*named.tokens)}
            owners = {source.owner for source in plan.owners_of(named.tokens)}
            assert named.is_whole == (owners == {named.owner})
        assert passing.reads_first == any(not named.is_whole for named in passing.named)
        named_blocks += [named.block for named in passing.named]
    assert named_blocks == list(range(blocks.num_blocks))


@pytest.mark.parametrize("case", CASES)
def test_segments_receive_what_they_see_of_keys_that_were_named_by_then(case):
    turns, cp_size, config = case
    blocks, plans = PassingBlocks.of(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    owner_of: dict[int, int] = {}
    for _, wave, passing in waves_of(plans):
        owner_of |= {named.block: named.owner for named in passing.named}
        assert all(owner_of[sent.block] == sent.owner for sent in passing.sent)
        seen = [keys_seen(blocks, segment.start) for segment in wave]
        for segment, expected in zip(wave, seen, strict=True):
            keys = keys_that_arrive(passing, segment)
            assert len(keys) == len(expected) and set(keys) == expected
        sent = [sum(s.num_keys for s in passing.sent if s.owner == rank) for rank in range(cp_size)]
        assert sum(sent) == len(set().union(*seen)), "what nobody sees is not sent"
        assert passing.num_padded == max(sent)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_things_to_attend_to_is_bounded_before_anything_is_built(case):
    (*_, n), _, config = case
    mask = mask_of(config, n)
    starts = mask.block_edges[:-1]
    num_parts = sum(len(mask.sources(start, start + 1)) + len(mask.passed(start)) / 16 for start in starts)
    assert num_parts <= most_sources(config, n)
