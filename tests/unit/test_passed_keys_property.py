"""What plans say of passed keys is the definition, token by token, for hundreds of random contexts.

A key is known here by who names it: (block, place in the order of what the block names).
"""

import random
from collections.abc import Iterator

import pytest
from reference import block_edges, extended_edges, num_seen_of_named

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


CASES = random_cases(300)


class Definition:
    """Who sees what, of a context that was encoded in these turns."""

    def __init__(self, turns: tuple[int, ...], star: StarConfig) -> None:
        self.edges = block_edges(turns[0], star.block_size)
        for end in turns[1:]:
            self.edges = extended_edges(self.edges, end, star.block_size)
        self.neighbor_blocks, self.passed_keys = star.neighbor_blocks, star.passed_keys
        anchor_size = star.block_size if star.anchor_size is None else star.anchor_size
        self.anchor_size = min(anchor_size, self.edges[1])

    def block_of(self, token: int) -> int:
        return max(block for block, edge in enumerate(self.edges[:-1]) if edge <= token)

    def size_of(self, block: int) -> int:
        return self.edges[block + 1] - self.edges[block]

    def first_whole(self, token: int) -> int:
        """Where that begins which a token sees without a gap."""
        return self.edges[max(0, self.block_of(token) - self.neighbor_blocks)]

    def named_keys_seen(self, token: int) -> set[Key]:
        block = self.block_of(token)
        return {
            (earlier, place)
            for earlier in range(max(0, block - self.neighbor_blocks))
            for place in range(min(self.size_of(earlier), self._num_seen(block, earlier)))
        }

    def num_named(self, block: int) -> int:
        return min(self.size_of(block), self.passed_keys + (0 if block else self.anchor_size))

    def _num_seen(self, block: int, earlier: int) -> int:
        return num_seen_of_named(
            block,
            earlier,
            anchor_size=self.anchor_size,
            passed_keys=self.passed_keys,
            neighbor_blocks=self.neighbor_blocks,
        )


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
    definition, plans = Definition(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    assert list(plans[-1].mask.block_edges) == definition.edges
    for plan in plans:
        mask = plan.mask
        assert isinstance(mask, StarMask) and mask.num_blocks <= len(definition.edges) - 1
        for block in range(mask.num_blocks):
            assert mask.num_named(block) == definition.num_named(block)
        for segment in plan.segments():
            passed = mask.passed(segment.start)
            keys = [(block, place) for block, num_keys in passed for place in range(num_keys)]
            assert [block for block, _ in passed] == sorted({block for block, _ in passed})
            assert len(keys) == len(set(keys)) == mask.num_passed(segment.start)
            for token in range(segment.start, segment.end):
                assert set(keys) == definition.named_keys_seen(token)
                assert segment.sources(mask) in ((), (Range(definition.first_whole(token), segment.start),))


@pytest.mark.parametrize("case", CASES)
def test_the_work_of_a_plan_is_the_number_of_visible_pairs(case):
    turns, cp_size, config = case
    definition = Definition(turns, config)
    for plan, start in zip(ContextPlan.chain(turns, cp_size, config, COSTS), (0, *turns), strict=False):
        pairs = [
            token + 1 - definition.first_whole(token) + len(definition.named_keys_seen(token))
            for token in range(start, plan.num_tokens)
        ]
        assert sum(segment.cost(plan.mask, PAIRS) for segment in plan.segments()) == sum(pairs)


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_named_once_by_a_rank_that_has_seen_all_of_it(case):
    turns, cp_size, config = case
    definition, plans = Definition(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    named_blocks = []
    for plan, wave, passing in waves_of(plans):
        for named in passing.named:
            assert named.tokens == tuple(definition.edges[named.block : named.block + 2])
            (last,) = (segment for segment in wave if segment.end == named.tokens.end)
            assert last.owner == named.owner
            seen = {*range(last.start, last.end), *(t for r in last.sources(plan.mask) for t in range(*r))}
            assert seen >= {*range(*named.tokens)}
            owners = {source.owner for source in plan.owners_of(named.tokens)}
            assert named.is_whole == (owners == {named.owner})
        assert passing.reads_first == any(not named.is_whole for named in passing.named)
        named_blocks += [named.block for named in passing.named]
    assert named_blocks == list(range(len(definition.edges) - 1))


@pytest.mark.parametrize("case", CASES)
def test_segments_receive_what_they_see_of_keys_that_were_named_by_then(case):
    turns, cp_size, config = case
    definition, plans = Definition(turns, config), ContextPlan.chain(turns, cp_size, config, COSTS)
    owner_of: dict[int, int] = {}
    for _, wave, passing in waves_of(plans):
        owner_of |= {named.block: named.owner for named in passing.named}
        assert all(owner_of[sent.block] == sent.owner for sent in passing.sent)
        seen = [definition.named_keys_seen(segment.start) for segment in wave]
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
