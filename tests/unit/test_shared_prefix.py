"""What of a context may be used by another one that begins with the same tokens."""

import random
from dataclasses import replace

import pytest
import torch
from played_ranks import PlayedContext

from megatron_star.config import StarConfig
from megatron_star.planning.layer_mask import Chunk, Window
from megatron_star.planning.mask import Range, mask_of_turns
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.planner import Planner
from megatron_star.planning.shared_prefix import num_equal_items, num_kept_tokens, num_shared_tokens

STAR = StarConfig(block_size=100)
EXACT = StarConfig(mode="exact")
PASSING = StarConfig(block_size=100, anchor_size=10, passed_keys=5)
NEIGHBORS = StarConfig(block_size=100, neighbor_blocks=1)

CASES = {
    "exact: any prefix": ((EXACT, [500]), (EXACT, [320]), 320),
    "the same blocks, a prefix in the midst of one": ((STAR, [400]), (STAR, [300, 350]), 350),
    "even blocks of another length: the first one": ((STAR, [400]), (STAR, [390]), 97),
    "a turn more": ((STAR, [350, 500]), (STAR, [350]), 350),
    "a turn less": ((STAR, [350]), (STAR, [350, 500]), 350),
    "another turn": ((STAR, [300, 450]), (STAR, [300, 401]), 350),
    "another mode: the first block": ((STAR, [400]), (EXACT, [400]), 100),
    "other neighbors: the first block": ((STAR, [400]), (NEIGHBORS, [400]), 100),
    "another anchor: the first block": (
        (STAR, [400]),
        (StarConfig(block_size=100, anchor_size=7), [400]),
        100,
    ),
    "a lone block that names nothing": ((STAR, [100]), (STAR, [400]), 100),
    "the same blocks, which name keys": ((PASSING, [400]), (PASSING, [300]), 300),
    "a block whose keys nobody names": ((PASSING, [400]), (StarConfig(mode="exact"), [400]), 99),
    "a last block that was longer": ((PASSING, [300, 350]), (PASSING, [300, 360]), 349),
    "a last block that was shorter": ((PASSING, [300, 360]), (PASSING, [300, 350]), 350),
    "nothing": ((PASSING, [400]), (PASSING, [0]), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_encoded_alike_in_two_contexts_of_the_same_tokens(name):
    (config, edges), (base_config, base_edges), expected = CASES[name]
    mask, base = mask_of_turns(config, edges), mask_of_turns(base_config, base_edges)
    assert num_shared_tokens(mask, base) == expected


@pytest.mark.parametrize(
    "config", [STAR, EXACT, PASSING, NEIGHBORS], ids=["star", "exact", "passing", "near"]
)
def test_the_mask_of_a_turn_is_a_prefix_of_that_of_the_conversation(config):
    mask = mask_of_turns(config, [30, 250, 400])
    for edges in ([30], [30, 250], [30, 250, 400]):
        assert mask.prefix(edges[-1]) == mask_of_turns(config, edges)


KEPT = {
    "all layers are full": ((), 77, 100, 77),
    "the end": ((Window(10), Chunk(40)), 100, 100, 100),
    "of a window, only the end is kept": ((Window(10),), 99, 100, 0),
    "a context shorter than the window": ((Window(101),), 60, 100, 60),
    "where a chunk begins": ((Chunk(30),), 70, 100, 60),
    "where chunks of all sizes begin": ((Chunk(30), Chunk(20)), 115, 200, 60),
    "in the last chunk": ((Chunk(30),), 95, 100, 95),
    "in the first chunk, which is over": ((Chunk(30),), 20, 100, 0),
    "a window that sees itself only": ((Window(1),), 20, 100, 20),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_prefix_is_used_only_where_layers_that_keep_the_end_have_what_follows_it_sees(name):
    masks, num_tokens, end, expected = KEPT[name]
    assert num_kept_tokens(masks, num_tokens, end) == expected


def test_the_rule_of_what_is_kept_by_its_definition():
    masks = [Window(1), Window(7), Window(30), Chunk(4), Chunk(6), Chunk(50)]
    for one in masks:
        for other in masks:
            for end in range(1, 41):
                kept = [set(range(mask.kept_from(end), end)) for mask in (one, other)]
                for n in range(1, end + 1):
                    seen = [set(range(mask.first_seen(n), n)) for mask in (one, other)]
                    is_there = all(s <= k for s, k in zip(seen, kept, strict=True))
                    found = num_kept_tokens((one, other), n, end)
                    assert (found == n) == is_there and found <= n


def test_equal_items_at_the_beginning_are_counted():
    for n in range(6):
        one = list(range(5))
        assert num_equal_items(one, [*one[:n], 9, *one[n + 1 :]]) == min(n, 5)
    assert num_equal_items([], [1]) == 0


def random_star(rng: random.Random, other: StarConfig | None) -> StarConfig:
    """Any configuration; or that of the other one, but for its waves."""
    wave_tokens = rng.choice([5, 17, 40, 1000])
    if other and rng.random() < 0.6:
        return replace(other, wave_tokens=wave_tokens)
    passed_keys = rng.choice([0, 4, 16, 100])
    return StarConfig(
        mode=rng.choice(["star", "star", "exact"]),
        block_size=rng.choice([20, 30, 60]),
        anchor_size=rng.choice([None, 7, 45]),
        neighbor_blocks=rng.choice([0, 0, 1]),
        passed_keys=passed_keys,
        anchor="broadcast" if passed_keys else rng.choice(["broadcast", "recompute"]),
        wave_tokens=wave_tokens,
    )


def encoded(plan: ContextPlan, base: PlayedContext | None = None) -> PlayedContext:
    """A context of equal tokens. What is seen before it is named, or twice, is noticed."""
    context = PlayedContext([0] * plan.num_tokens, plan, base)
    for wave in range(len(plan.waves)):
        context.encode(wave)
    return context


@pytest.mark.parametrize("seed", range(120))
def test_a_prefix_and_the_rest_on_it_see_what_the_whole_sees_alone(seed):
    """Also a prefix of what is on a prefix itself, and of fewer tokens than could be shared."""
    rng = random.Random(seed)
    planner = Planner(TokenCosts(500.0, 1.0), rng.choice([1, 2, 3]))
    star, contexts = None, []
    for _ in range(5):
        star = random_star(rng, star)
        edges = sorted(rng.sample(range(1, 150), rng.choice([1, 1, 2, 3])))
        if contexts and rng.random() < 0.5:
            edges = sorted({*rng.choice(contexts)[0], edges[-1]})
        mask = mask_of_turns(star, edges)
        bases = [(num_shared_tokens(mask, other.plan.mask), other) for _, other in contexts]
        num_reused, base = max(
            (found for found in bases if found[0] > found[1].plan.start),
            key=lambda b: b[0],
            default=(0, None),
        )
        if base and rng.random() < 0.3:
            num_reused = rng.randint(base.plan.start + 1, num_reused)
        plan = planner.of_turns(edges, star, base.plan.prefix(num_reused) if base else None)
        context, alone = encoded(plan, base), encoded(planner.of_turns(edges, star))
        assert torch.equal(context.mask, alone.mask) and torch.equal(context.passed, alone.passed)
        assert alone.named.items() <= context.named.items() and plan.mask == alone.plan.mask
        assert plan.prefix(edges[-1]) == plan and plan.start == num_reused
        contexts.append((edges, context))


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_of_a_prefix_is_what_the_plan_says_of_its_first_tokens(seed):
    rng = random.Random(seed)
    planner = Planner(TokenCosts(500.0, 1.0), rng.choice([1, 2, 3]))
    plan = planner.of_turns(sorted(rng.sample(range(1, 150), 2)), random_star(rng, None))
    num_tokens = rng.randint(1, plan.num_tokens)
    owners = [next(iter(plan.owners_of(Range(token, token + 1)))).owner for token in range(num_tokens)]
    prefix = plan.prefix(num_tokens)
    assert [source.owner for source in prefix.stored for _ in range(source.start, source.end)] == owners
    assert prefix.owned_tokens == tuple(owners.count(rank) for rank in range(planner.cp_size))
    expected, found = encoded(plan), encoded(prefix)
    assert torch.equal(found.mask, expected.mask[:num_tokens, :num_tokens])
