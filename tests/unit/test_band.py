"""A band cut into pieces is that band."""

import pytest
import torch

from megatron_star.attention.band import Sight, band_pieces

MASKS = {Sight.ALL: lambda m: m, Sight.UP_TO_OWN: torch.tril, Sight.FROM_OWN: torch.triu}


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("before", [0, 1, 3, 20])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 12, 13, 40])
def test_the_pieces_of_a_band_are_the_band(num_rows, before, window):
    """Each entry once; of squares, both causal kinds."""
    found = torch.zeros(num_rows, num_rows + before, dtype=torch.int64)
    for rows, keys, sight in band_pieces(num_rows, num_rows + before, window):
        assert rows and keys and (sight is Sight.ALL or len(rows) == len(keys))
        piece = torch.ones(len(rows), len(keys), dtype=torch.int64)
        found[rows.start : rows.stop, keys.start : keys.stop] += MASKS[sight](piece)
    own, column = torch.arange(num_rows)[:, None] + before, torch.arange(num_rows + before)
    expected = (column <= own) & (column > own - (window or num_rows + before))
    assert torch.equal(found, expected.long())


def test_a_band_is_cut_into_few_pieces():
    assert len(band_pieces(2048, 2048)) == 1
    assert len(band_pieces(2048, 2048, 1024)) == 3
    assert len(band_pieces(2048, 3071, 1024)) == 4  # corners and squares
