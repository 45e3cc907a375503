"""Sizes that nobody asks for follow from the length of the context, and those that are asked for stay."""

import pytest

from megatron_star.config import MOST_TOKENS_IN_REQUEST, StarConfig
from megatron_star.planning.mask import most_sources
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.planner import Planner
from megatron_star.planning.sizes import GROWTH, length_for_sizes, sizes_of, with_sizes
from megatron_star.server.submission import MOST_BLOCK_SOURCES

K, M = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "passed_keys"),
    [
        (0, 512, 128),
        (1, 512, 128),
        (4 * K, 512, 128),
        (11 * K, 512, 128),
        (12 * K, 1 * K, 128),
        (24 * K, 2 * K, 256),
        (128 * K, 8 * K, 1 * K),
        (1 * M, 32 * K, 4 * K),
        (16 * M, 32 * K, 4 * K),
    ],
)
@pytest.mark.parametrize("mode", ["star", "auto"])
def test_star_alone_has_the_recommended_sizes(mode, num_tokens, block_size, passed_keys):
    star = with_sizes(StarConfig(mode=mode), num_tokens)
    assert (star.block_size, star.anchor_size, star.passed_keys) == (block_size, 128, passed_keys)
    assert with_sizes(star, 7 * num_tokens) == star


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"block_size": 8 * K}, (8 * K, 8 * K, 0)),
        ({"block_size": 8 * K, "anchor_size": 0}, (8 * K, 0, 0)),
        ({"block_size": 8 * K, "anchor_size": 5, "passed_keys": 7}, (8 * K, 5, 7)),
        ({"block_size": 8 * K, "passed_keys": 7}, (8 * K, 128, 7)),
        ({"anchor_size": 0}, (4 * K, 0, 512)),
        ({"passed_keys": 7}, (4 * K, 128, 7)),
        ({"passed_keys": 0}, (16 * K, 16 * K, 0)),
        ({"anchor": "recompute"}, (16 * K, 16 * K, 0)),
        ({"neighbor_blocks": 1}, (4 * K, 128, 512)),
    ],
)
def test_what_is_asked_for_stays_and_a_block_size_alone_is_star_as_published(asked, found):
    assert tuple(sizes_of(with_sizes(StarConfig(**asked), 64 * K)).values()) == found


@pytest.mark.parametrize(
    ("num_tokens", "block_size"), [(1, 8 * K), (32 * K, 8 * K), (64 * K, 16 * K), (M, 32 * K)]
)
def test_the_published_block_is_a_quarter_of_the_context(num_tokens, block_size):
    assert with_sizes(StarConfig(passed_keys=0), num_tokens).block_size == block_size


def test_exact_has_no_sizes():
    star = StarConfig(mode="exact")
    assert with_sizes(star, 64 * K) == star and sizes_of(star) == {}


def test_who_asks_for_the_sizes_that_were_used_gets_the_same_plan():
    planner = Planner(TokenCosts(1000.0, 1.0), cp_size=2)
    found = planner.plan(16 * K, StarConfig())
    again = planner.plan(16 * K, StarConfig(**sizes_of(found.star)))
    assert found == again and found.plan.num_blocks == 16


def test_auto_is_star_where_star_costs_less():
    planner = Planner(TokenCosts(1000.0, 1.0), cp_size=2)
    modes = [planner.plan(n, StarConfig(mode="auto")).star.mode for n in (100, 256, 16 * K)]
    assert modes == ["exact", "exact", "star"]


CONVERSATIONS = {
    "one turn": ((), 5000, 5000),
    "short turns": ((16_000, 24_000, 32_000, 60_000), 63_999, 16_000),
    "a greeting and a document": ((300,), 100_000, 100_000),
    "a document, and questions on it": ((100_000, 101_000), 102_000, 100_000),
    "grown by and by": ((1000, 4000, 15_000, 16_000), 60_000, 16_000),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_keeps_its_sizes_until_it_is_four_times_as_long(name):
    turn_edges, num_tokens, chosen_by = CONVERSATIONS[name]
    assert length_for_sizes(num_tokens, turn_edges) == chosen_by


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_further_turn_extends_the_contexts_of_the_turns_before(name):
    """Unless sizes are chosen anew in it."""
    turn_edges, num_tokens, _ = CONVERSATIONS[name]
    edges = (*turn_edges, num_tokens)
    planner = Planner(TokenCosts(1000.0, 1.0), cp_size=2)
    for turn in range(1, len(edges)):
        before = planner.plan(edges[turn - 1], StarConfig(), edges[: turn - 1])
        after = planner.plan(edges[turn], StarConfig(), edges[:turn])
        if edges[turn] < 4 * length_for_sizes(edges[turn - 1], edges[: turn - 1]):
            assert after.star == before.star
            assert after.plan.mask.prefix(edges[turn - 1]) == before.plan.mask


@pytest.mark.parametrize("num_tokens", [4 * K, 64 * K, M, MOST_TOKENS_IN_REQUEST])
def test_the_server_takes_contexts_of_every_length_with_the_recommended_sizes(num_tokens):
    """And conversations as long as they may become before sizes are chosen anew."""
    for length in (num_tokens, num_tokens // GROWTH):
        assert most_sources(with_sizes(StarConfig(), length), num_tokens) <= MOST_BLOCK_SOURCES


def test_a_plan_that_is_built_directly_has_the_same_sizes_as_one_of_the_planner():
    star = StarConfig()
    mask = ContextPlan.build(64 * K, 2, star).mask
    assert mask == Planner(TokenCosts(), 2).plan(64 * K, star).plan.mask
    assert (mask.num_blocks, mask.anchor_size, mask.passed_keys) == (16, 128, 512)
