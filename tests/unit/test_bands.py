"""Bands of rows over pieces of keys are attention with the mask, token by token."""

import itertools
from functools import partial
from random import Random

import pytest
import torch
from reference import attention

from megatron_star.algorithm.bands import add_in_band, readers_of
from megatron_star.algorithm.kv_pieces import KvPiece, joined, pieces_within, whole
from megatron_star.algorithm.recent_kv import RecentTail, copied
from megatron_star.attention.kernels import KERNELS
from megatron_star.attention.merge import PartialSum
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS, TAIL_CHUNK_TOKENS, recent_tail_capacity
from megatron_star.planning.layer_mask import Chunk, LayerMask, Window

MASKS = [Window(1), Window(2), Window(5), Window(40), Chunk(1), Chunk(4), Chunk(7), Chunk(64)]
SCALE = 0.4


def _random(count: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 1, heads, 8, generator=torch.Generator().manual_seed(seed))


def _piece(start: int, end: int) -> KvPiece:
    """Of one and the same sequence, whichever part is asked for."""
    return KvPiece(start, end, _random(64, 2, 1)[start:end], _random(64, 2, 2)[start:end])


def _expected(
    mask: LayerMask, query: torch.Tensor, position: int, held: set[int]
) -> tuple[torch.Tensor, ...]:
    """Row by row, in float64."""
    everything, parts = _piece(0, 64), []
    for row in range(len(query)):
        seen = [t for t in range(mask.first_seen(position + row), position + row + 1) if t in held]
        parts.append(
            attention(query[row : row + 1], everything.key[seen], everything.value[seen], softmax_scale=SCALE)
        )
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 20])
@pytest.mark.parametrize("edges", [[(0, 30)], [(3, 4), (9, 17), (22, 30)], [(29, 30)], []])
def test_rows_see_of_their_tail_and_of_pieces_before_it_what_their_mask_says(mask, num_rows, edges):
    context, position = 30, 33
    query = _random(num_rows, 4, 3)
    pieces = [*(_piece(*edge) for edge in edges), _piece(context, position + num_rows)]
    partials = PartialSum(query)
    attend = partial(KERNELS["torch-cpu"].loaded(), softmax_scale=SCALE)
    for band in mask.bands(position, position + num_rows):
        for piece in pieces_within(pieces, band.first, band.end):
            add_in_band(partials, attend, band, band.start - position, piece)
    held = {token for piece in pieces for token in range(piece.start, piece.end)}
    for found, expected in zip(partials.merged(), _expected(mask, query, position, held), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_readers_of_tokens_before_a_band_are_those_that_see_them(mask):
    for start, end, band_start, band_end in [(0, 9, 9, 20), (4, 6, 9, 30), (8, 9, 9, 10), (0, 12, 12, 13)]:
        for band in mask.bands(band_start, band_end):
            for piece in pieces_within([_piece(start, end)], band.first, band.end):
                seeing_all, seeing_some = readers_of(band, piece.start, piece.end)
                for position in range(band.start, band.end):
                    first = mask.first_seen(position)
                    assert (position in seeing_all) == (first <= piece.start)
                    assert (position in seeing_some) == (piece.start < first < piece.end)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 1, 9, 1, 1, 1], [20], [2, 3, 4, 5]])
def test_a_recent_tail_gives_what_its_new_tokens_see(mask, sizes):
    tail, end = RecentTail(mask, 11), 11
    for size in sizes:
        new = _piece(end, end + size)
        seen = tail.append(end, new.key, new.value)
        expected = _piece(max(11, mask.first_seen(end)), end + size)
        assert seen[:2] == expected[:2]
        assert torch.equal(seen.key, expected.key) and torch.equal(seen.value, expected.value)
        end += size


@pytest.mark.parametrize("mask", [*MASKS, Window(300), Chunk(300)], ids=str)
def test_a_recent_tail_forgets_its_end_and_goes_on_as_if_it_had_never_been(mask):
    """Against all tokens, each with the number of the time at which it came."""
    tail, kept, new, random = RecentTail(mask, 11), [], [], Random(0)
    for time in range(600):
        if time % 3 == 2:
            del kept[len(kept) - random.randint(0, min(len(new), MOST_PROPOSED_TOKENS)) :]
        new = [1000 * time + token for token in range(random.choice([1, 1, 1, 2, 5, 17]))]
        first = max(0, mask.first_seen(11 + len(kept)) - 11)
        position = 11 + len(kept)
        kept += new
        token = torch.tensor(new, dtype=torch.float64)[:, None, None, None]
        seen = tail.append(position, token, -token)
        assert seen[:2] == (11 + first, 11 + len(kept))
        assert seen.key.flatten().tolist() == kept[first:] == (-seen.value).flatten().tolist()
        assert tail.num_bytes <= 2 * recent_tail_capacity(len(kept) + 17, mask) * 8


@pytest.mark.parametrize("mask", [Window(1), Window(100), Window(256), Window(700), Chunk(300)], ids=str)
@pytest.mark.parametrize("query", [0, 1, 5, 99, 255, 256, 1000])
def test_a_recent_tail_takes_at_most_the_memory_that_is_reserved_for_its_length(mask, query):
    """And so never more than for what can be seen and a chunk or two, however long it grows."""
    tail, token, end = RecentTail(mask, 11), torch.zeros(1, 1, 1, 1), 11
    for size in [query] * (query > 0) + [1] * 3 * TAIL_CHUNK_TOKENS + [70, 1, 1]:
        tail.append(end, *torch.zeros(2, size, 1, 1, 1))
        end += size
        assert tail.num_bytes <= 2 * recent_tail_capacity(end - 11, mask) * token.nbytes
    assert tail.num_bytes <= 2 * (mask.size + 2 * TAIL_CHUNK_TOKENS) * token.nbytes


def test_what_a_recent_tail_keeps_is_moved_once_in_a_chunk():
    tail, token = RecentTail(Window(256), 0), torch.zeros(1, 1, 1, 1)
    places = []
    for position in range(10 * TAIL_CHUNK_TOKENS):
        tail.append(position, token, token)
        places.append(tail.buffer[0].data_ptr())
    assert sum(a != b for a, b in itertools.pairwise(places)) <= 10


def test_pieces_are_joined_in_the_order_of_the_context_and_copied_apart():
    pieces = [_piece(9, 12), _piece(2, 5), _piece(5, 9)]
    found = whole(pieces, 3, 11)
    assert found[:2] == (3, 11) and torch.equal(found.key, _piece(3, 11).key)
    (copy,) = copied([pieces[0]])
    assert torch.equal(copy.value, pieces[0].value) and copy.key.data_ptr() != pieces[0].key.data_ptr()
    with pytest.raises(AssertionError):
        joined([pieces[1], pieces[0]])
