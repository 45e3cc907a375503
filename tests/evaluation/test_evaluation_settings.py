"""Settings as text."""

import pytest

from megatron_star.config import StarConfig
from megatron_star.evaluation.setting_text import (
    encoded_as,
    parse_setting,
    parse_settings,
    setting_name,
    what_was_chosen,
)
from megatron_star.planning.plan import TokenCosts
from megatron_star.planning.planner import Planner

SETTINGS = {
    "exact": StarConfig(mode="exact"),
    "star": StarConfig(),
    "star block_size=1K": StarConfig(block_size=1024),
    "star block_size=500 anchor_size=0 neighbor_blocks=2": StarConfig(
        block_size=500, anchor_size=0, neighbor_blocks=2
    ),
    "star neighbor_blocks=1024": StarConfig(neighbor_blocks=1024),
    "star block_size=512 anchor_size=64 passed_keys=64": StarConfig(
        block_size=512, anchor_size=64, passed_keys=64
    ),
    "star passed_keys=0": StarConfig(passed_keys=0),
    "auto block_size=1K anchor=recompute wave_tokens=2K": StarConfig(
        mode="auto", block_size=1024, anchor="recompute", wave_tokens=2048
    ),
}


@pytest.mark.parametrize("text", SETTINGS)
def test_a_setting_is_read_and_named_as_it_is_written(text):
    star = parse_setting(text)
    assert star == SETTINGS[text]
    assert setting_name(star) == text


def test_the_same_setting_has_one_name_however_it_is_written():
    assert setting_name(parse_setting(" star  anchor_size=1024 block_size=2K ")) == (
        "star block_size=2K anchor_size=1K"
    )
    assert setting_name(StarConfig(mode="exact", block_size=5, anchor_size=1)) == "exact"
    assert setting_name(parse_setting("star passed_keys=0 block_size=2K")) == "star block_size=2K"


def test_what_was_chosen_is_a_sentence_that_does_not_grow():
    assert what_was_chosen("star block_size=1K", {"star block_size=1K"}) is None
    assert what_was_chosen("star", map(str, range(9))) == "'star' was '0' or '1' or '2' or '3', and 5 others."


def test_what_is_left_open_is_named_as_it_was_chosen():
    planner = Planner(TokenCosts(), cp_size=1)
    star = parse_setting("star wave_tokens=512")
    assert encoded_as(star, planner.plan(4096, star).star) == (
        "star block_size=256 anchor_size=64 passed_keys=64 wave_tokens=512"
    )
    star = parse_setting("star block_size=1K")
    assert encoded_as(star, planner.plan(4096, star).star) == "star block_size=1K"
    assert encoded_as(parse_setting("auto"), planner.plan(100, parse_setting("auto")).star) == "exact"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "setting '': it must begin with one of star, exact, auto"),
        ("stars block_size=1", "setting 'stars block_size=1': it must begin with"),
        ("star block=1", "'block=1' is not one of block_size=.., anchor_size=.."),
        ("star block_size", "'block_size' is not one of"),
        ("star block_size=1G", "'block_size=1G': '1G' is not a number of tokens"),
        ("star neighbor_blocks=one", "'neighbor_blocks=one': invalid literal"),
        ("star block_size=64 anchor=recompute passed_keys=8", "passed_keys is 8: it must be 0 with anchor"),
        ("star block_size=0", "block_size is 0: it must be a whole number of at least 1"),
        ("star neighbor_blocks=-1", "neighbor_blocks is -1"),
        ("star anchor=both", "anchor is 'both': it must be one of broadcast, recompute"),
        ("star block_size=1 block_size=2", "an option is set twice"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        parse_setting(text)


def test_settings_keep_their_order_and_must_differ():
    assert list(parse_settings(["star block_size=1024", "exact"])) == ["star block_size=1K", "exact"]
    with pytest.raises(ValueError, match="two of the settings are the same"):
        parse_settings(["star block_size=1024", "star block_size=1K"])
