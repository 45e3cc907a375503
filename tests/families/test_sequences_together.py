"""Sequences whose tails have other lengths and ranks see their own window of a context that they share."""

import pytest
import torch
from cases import WINDOW
from distributed import run_ranks
from random_models import VOCAB_SIZE
from sequences_ranks import together_and_alone


@pytest.mark.parametrize("cp_size", [1, 3])
def test_sequences_that_share_a_context_of_a_model_with_windows_do_not_see_each_other(converted, cp_size):
    tokens = torch.randint(VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(5)).tolist()
    long_query, short = (
        [tokens[40 : 40 + WINDOW + 4], *([t] for t in tokens[60:66])],
        [[t] for t in tokens[70:74]],
    )
    fed = [long_query, short, [tokens[80:84], [1], [2]]]
    results = run_ranks(cp_size, together_and_alone, str(converted("gpt_oss").megatron), tokens[:40], fed)
    for pairs in results:
        assert len(pairs) == sum(map(len, fed))
        for together, alone in pairs:
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
