"""Attention to tails over addresses gives what the loop over tails gives, in Triton's interpreter."""

import pytest
import torch
from distributed import run_ranks
from tails_ranks import by_addresses_and_by_loop

pytest.importorskip("triton", reason="Triton is in torch's CUDA builds and in the extra `dev`")


@pytest.mark.parametrize(("name", "cp_size"), [("gpt_oss", 2), ("gemma2", 1), ("llama4_text", 1)])
def test_tails_in_one_call_give_the_logits_of_the_loop(converted, name, cp_size):
    for pairs, num_by_address in run_ranks(cp_size, by_addresses_and_by_loop, str(converted(name).megatron)):
        assert num_by_address == 7
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
