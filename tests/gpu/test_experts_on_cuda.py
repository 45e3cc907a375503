"""Grouped products of experts, and attention to latents, on a GPU: as on a CPU, without waiting for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from expert_blocks import one_rank
from some_experts import COUNTS, KINDS, experts_of, inputs

from megatron_star.attention.torch_latent import TORCH_LATENT
from megatron_star.model.grouped_experts import StackedExperts

LATENT, ROTATED, HEADS = 512, 64, 16


@contextmanager
def without_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def groups():
    with one_rank() as groups:
        yield groups


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_products_are_those_of_a_cpu(gpu, groups, monkeypatch, kind, counts):
    arguments = inputs(COUNTS[counts], torch.bfloat16)
    experts = experts_of(StackedExperts, groups, torch.bfloat16, **KINDS[kind])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.index)  # `groups` says: the CPU
    expected, _ = experts(*arguments)
    on_gpu = [argument.to(gpu) for argument in arguments]
    experts.to(gpu)
    assert experts._takes_grouped_products(on_gpu[0])
    experts(*on_gpu)
    with without_waiting():
        found, _ = experts(*on_gpu)
    assert (found.cpu() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize(("sq", "sk", "causal"), [(1, 3_001, False), (5, 70, True), (129, 4_097, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_latents_is_that_of_a_cpu(gpu, dtype, sq, sk, causal):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(tokens, 1, heads, LATENT + ROTATED, generator=generator).to(dtype)
        for tokens, heads in ((sq, HEADS), (sk, 1))
    )
    options = {"causal": causal, "softmax_scale": 0.05}
    kernel = TORCH_LATENT.loaded()
    expected = kernel(query.float(), key.float(), key.float()[..., :LATENT], **options)
    found = kernel(query.to(gpu), key.to(gpu), key.to(gpu)[..., :LATENT], **options)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.out.float().cpu(), expected.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.softmax_lse.cpu(), expected.softmax_lse, atol=tolerance, rtol=tolerance)
