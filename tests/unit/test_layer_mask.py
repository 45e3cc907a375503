"""Layers with a mask of their own see what the definition of windows and chunks says, in every plan."""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from types import SimpleNamespace

import pytest

from megatron_star.config import StarConfig
from megatron_star.planning.layer_mask import Band, Chunk, LayerMask, Window, layer_masks
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.reads import Read, wave_reads

N = 14
SIZES = [1, 2, 3, 5, 7, N - 1, N, N + 1, 40]
MASKS = [mask(size) for mask in (Window, Chunk) for size in SIZES]


def sees(mask: LayerMask, position: int) -> set[int]:
    """By definition."""
    if isinstance(mask, Window):
        return {token for token in range(position + 1) if position - token < mask.size}
    return {token for token in range(position + 1) if token // mask.size == position // mask.size}


def seen_in(band: Band) -> dict[int, set[int]]:
    """What each token of a band sees, by the definition of a band."""
    bound = band.end if band.window is None else band.window
    return {
        position: set(range(max(band.first, position - bound + 1), position + 1))
        for position in range(band.start, band.end)
    }


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_token_sees_what_the_definition_says(mask):
    for position in range(2 * N):
        assert set(range(mask.first_seen(position), position + 1)) == sees(mask, position)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_sources_bands_and_pairs_are_those_of_the_tokens_for_every_range(mask):
    for start, end in combinations_with_replacement(range(N + 1), 2):
        seen = {position: sees(mask, position) for position in range(start, end)}
        sources = [token for source in mask.sources(start, end) for token in range(*source)]
        assert sources == sorted(token for token in set().union(*seen.values()) if token < start)
        bands = mask.bands(start, end)
        assert [t for band in bands for t in range(band.start, band.end)] == list(range(start, end))
        assert {p: keys for band in bands for p, keys in seen_in(band).items()} == seen
        assert mask.pairs(start, end) == sum(map(len, seen.values()))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_band_has_no_key_that_none_of_its_tokens_sees_and_no_bound_that_binds_none(mask):
    for start, end in combinations_with_replacement(range(N + 1), 2):
        for band in mask.bands(start, end):
            assert band.first == min(set().union(*seen_in(band).values()))
            assert band.window is None or band.window < band.end - band.first


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_kept_of_a_context_is_what_later_tokens_see_of_it(mask):
    for num_tokens in range(N + 1):
        later = set().union(*(sees(mask, position) for position in range(num_tokens, num_tokens + 50)))
        kept = range(mask.kept_from(num_tokens), num_tokens)
        assert set(kept) == {token for token in later if token < num_tokens}


def test_masks_are_equal_and_hash_alike_by_kind_and_size():
    assert len({Window(4), Window(4), Window(5), Chunk(4), Chunk(4)}) == 3


STARS = [
    StarConfig(block_size=10),
    StarConfig(block_size=10, anchor_size=3),
    StarConfig(block_size=10, anchor="recompute"),
    StarConfig(block_size=10, anchor_size=4, neighbor_blocks=1, anchor="recompute"),
    StarConfig(mode="exact"),
]


@pytest.mark.parametrize("wave_tokens", [7, 1000])
@pytest.mark.parametrize("mask", [Window(1), Window(2), Window(9), Window(500), Chunk(1), Chunk(12)], ids=str)
@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_what_a_layer_reads_is_what_its_mask_sees_before_each_segment(cp_size, mask, wave_tokens):
    """Whatever the plan of the other layers is: neither its anchor nor copies of the anchor stand for it."""
    for star in STARS:
        config = StarConfig(**{**vars(star), "wave_tokens": wave_tokens})
        _, plan = ContextPlan.chain((40, 97), cp_size, config)
        for wave in plan.waves:
            _check_reads(plan, wave, mask)


def _check_reads(plan: ContextPlan, wave: Sequence, mask: LayerMask) -> None:
    for rank in range(plan.cp_size):
        own = [segment for segment in wave if segment.owner == rank]
        reads = wave_reads(plan, wave, rank, mask)
        assert _read_by_segments(reads, own) == _seen_before(own, mask)
        for read in reads:
            others = [segment for segment in wave if segment.owner != read.source.owner]
            wanted = {token for _, token in _seen_before(others, mask)}
            assert read.crosses_ranks == (not wanted.isdisjoint(range(*read.source[:2])))


def _seen_before(segments: Sequence, mask: LayerMask) -> set[tuple[int, int]]:
    """(start of a segment, token before it that it sees), by definition."""
    return {
        (segment.start, token)
        for segment in segments
        for position in range(segment.start, segment.end)
        for token in sees(mask, position)
        if token < segment.start
    }


def _read_by_segments(reads: Sequence[Read], own: Sequence) -> set[tuple[int, int]]:
    """(start of a segment, token that it reads), of a rank's segments; copies of the anchor read nothing."""
    rows = [sum(s.num_rows for s in own[:i]) + own[i].recomputed for i in range(len(own))]
    ends = [row + segment.num_tokens for row, segment in zip(rows, own, strict=True)]
    found = set()
    for read in reads:
        for first, last in read.rows:
            readers = [i for i, row in enumerate(rows) if first <= row < last]
            assert sum(own[i].num_tokens for i in readers) <= last - first
            assert {first, last} <= {*rows, *ends}
            found |= {(own[i].start, token) for i in readers for token in range(*read.source[:2])}
    return found


def config_with(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(num_layers=3, **fields)


def test_the_masks_of_layers_are_those_of_the_configuration():
    none = (None, None, None)
    assert layer_masks(config_with()) == layer_masks(config_with(window_size=None)) == none
    assert layer_masks(config_with(window_size=[-1, -1], window_attn_skip_freq=[1, 0, 1])) == none
    windows = config_with(window_size=[7, 0], window_attn_skip_freq=[1, 0, 1])
    assert layer_masks(windows) == (Window(8), None, Window(8))
    assert layer_masks(config_with(window_size=(0, 0))) == (Window(1),) * 3
    assert layer_masks(config_with(window_attn_skip_freq=[1, 0, 1])) == none
    assert (
        layer_masks(config_with(window_size=(-1, -1)))
        == layer_masks(config_with(window_size=(-1, 0)))
        == none
    )
    every_second = config_with(window_size=(7, 0), window_attn_skip_freq=2)
    assert layer_masks(every_second) == (Window(8), None, Window(8)), "Megatron's short way"
    chunks = config_with(attention_chunk_size=16, chunked_layers=[1, 1, 0])
    assert layer_masks(chunks) == (Chunk(16), Chunk(16), None)
    both = {**vars(windows), "attention_chunk_size": 4, "chunked_layers": [0, 1, 0]}
    assert layer_masks(SimpleNamespace(**both)) == (Window(8), Chunk(4), Window(8))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"window_size": [7, 1]}, r"window_size is \[7, 1\]"),
        ({"window_size": [-2, 0]}, r"window_size is \[-2, 0\]"),
        ({"window_size": [7, 0], "window_attn_skip_freq": [1, 0]}, "a list of 3"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        ({"window_size": [7, 0], "attention_chunk_size": 4, "chunked_layers": [0, 1, 0]}, "both a window"),
    ],
)
def test_fields_that_describe_no_mask_are_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        layer_masks(config_with(**fields))
