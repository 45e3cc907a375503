"""What masks say of tokens is what their definition says."""

from dataclasses import replace

import pytest
from reference import block_edges, star_mask

from megatron_star.config import OPTIONS, StarConfig
from megatron_star.planning.mask import MASKS, ExactMask, mask_of, most_sources

STARS = [
    StarConfig(block_size=10),
    StarConfig(block_size=10, anchor_size=3),
    StarConfig(block_size=10, anchor_size=0, neighbor_blocks=1),
    StarConfig(block_size=10, anchor_size=4, neighbor_blocks=3),
    StarConfig(block_size=1),
    StarConfig(block_size=100),
    StarConfig(block_size=10, anchor_size=3, passed_keys=4),
    StarConfig(block_size=7, anchor_size=0, neighbor_blocks=1, passed_keys=20),
]


def test_every_mode_that_is_no_choice_between_others_has_a_mask():
    assert {*MASKS, "auto"} == {*OPTIONS["mode"].choices}


@pytest.mark.parametrize("star", STARS)
def test_what_is_hidden_from_a_token_is_what_the_definition_hides(star):
    """Unless it is passed: which keys are, nobody knows before they are there."""
    mask = mask_of(star, 57)
    seen = star_mask(57, star.block_size, star.anchor_size, star.neighbor_blocks)
    for position in range(57):
        hidden = [token for r in mask.hidden(position) for token in range(*r)]
        assert all(r.end <= position for r in mask.sources(position, position + 1))
        assert hidden == [token for token in range(position) if not seen[position, token]]


def test_exact_hides_nothing():
    mask = mask_of(StarConfig(mode="exact"), 57)
    assert not any(mask.hidden(position) for position in range(57))


def test_contexts_of_one_block_are_the_same_whatever_else_was_asked():
    masks = {mask_of(star, 10) for star in (*STARS[:4], STARS[5], StarConfig(mode="exact"))}
    assert masks == {ExactMask((0, 10))}


def test_contexts_of_more_blocks_are_the_same_if_blocks_anchor_and_neighbors_are():
    assert len({mask_of(star, 57) for star in STARS}) == len(STARS)
    same = replace(STARS[0], anchor_size=10, wave_tokens=5, anchor="recompute")
    assert mask_of(same, 57) == mask_of(STARS[0], 57)
    assert mask_of(STARS[0], 57, mask_of(STARS[0], 25)) != mask_of(STARS[0], 57)


@pytest.mark.parametrize("star", STARS)
def test_sources_are_bounded_before_anything_is_built(star):
    mask = mask_of(star, 57)
    of_blocks = [mask.sources(start, start + 1) for start in block_edges(57, star.block_size)[:-1]]
    assert sum(map(len, of_blocks)) <= most_sources(star, 57)
    assert most_sources(replace(star, mode="auto"), 57) == most_sources(star, 57)
    assert most_sources(replace(star, mode="exact"), 57) == 1
