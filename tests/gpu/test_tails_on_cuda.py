"""Attention to tails over addresses on a GPU: its kernels, whole models against the loop, recorded steps."""

import pytest
import torch
from distributed import run_ranks
from tail_kernels import SHAPES, Shape, check
from tails_ranks import by_addresses_and_by_loop, recorded_and_run

LONG = [
    Shape(32, 8, 128, 128, [[1], [255], [4_097], [0]], most_keys=8_192),
    Shape(8, 1, 256, 256, [[300, 1_000, 5]], most_keys=4_096),
    Shape(16, 2, 192, 128, [[700], [90]] * 40, most_keys=1_024),
]
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=lambda shape: "-".join(map(str, shape[:4])))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rows_are_put_into_their_tails_and_attend_to_what_they_see(gpu, dtype, tolerance, shape, starts):
    from megatron_star.attention import triton_tails  # noqa: PLC0415 - not where torch has no Triton

    if dtype == torch.float32 and shape.key_size > 128:
        tolerance *= 3  # sums of 256 products in another order: 1.8e-5 on an H100
    check(triton_tails, shape, torch.zeros(0, dtype=dtype, device=gpu), tolerance, starts=starts)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "qwen3_moe"])
def test_tails_in_one_call_give_the_logits_of_the_loop(converted, name, num_ranks):
    for pairs, num_by_address in run_ranks(
        num_ranks, by_addresses_and_by_loop, str(converted(name).megatron)
    ):
        assert num_by_address == 7
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_compiled_layers_with_tails_in_one_call_give_the_logits_of_the_loop(checkpoints):
    arguments = (str(checkpoints("qwen3").megatron), torch.float32, (4, 8))
    [(pairs, num_by_address)] = run_ranks(1, by_addresses_and_by_loop, *arguments)
    assert num_by_address == 7
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_tails_in_one_call_are_near_the_loop_in_bfloat16(checkpoints):
    arguments = (str(checkpoints("llama").megatron), torch.bfloat16)
    [(pairs, _)] = run_ranks(1, by_addresses_and_by_loop, *arguments)
    for found, expected in pairs:
        assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("num_sequences", [1, 8])
@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_a_recorded_step_runs_later_ones_once_it_has_their_inputs(
    checkpoints, converted, name, num_sequences
):
    pair = converted(name) if name == "gemma3_text" else checkpoints(name)
    [pairs] = run_ranks(1, recorded_and_run, str(pair.megatron), num_sequences)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
