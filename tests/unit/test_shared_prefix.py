"""What of a context may be used by another one that begins with the same tokens."""

import pytest

from megatron_star.config import StarConfig
from megatron_star.planning.layer_mask import Chunk, Window
from megatron_star.planning.mask import mask_of_turns
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
