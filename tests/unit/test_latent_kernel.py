"""Attention to latents: torch's products keep the kernels' contract, and both forms are the same."""

from types import SimpleNamespace

import kernel_contract as contract
import pytest
import reference
import torch
from kernel_contract import BANDS, EMPTY, HEADS, SHAPES, TOLERANCE, tensors
from torch import Tensor

from megatron_star.attention import torch_latent
from megatron_star.attention.kernels import KERNELS
from megatron_star.attention.latent_kernel import (
    AbsorbedAttention,
    CheaperFormAttention,
    Latent,
    LatentKernel,
)
from megatron_star.attention.torch_latent import TORCH_LATENT

KERNEL = TORCH_LATENT.loaded()
NUM_HEADS, LATENT, PLAIN, ROTATED, VALUE = 5, 24, 12, 8, 10
SHAPE = SimpleNamespace(
    multi_latent_attention=True,
    num_attention_heads=NUM_HEADS,
    q_lora_rank=None,
    kv_lora_rank=LATENT,
    qk_head_dim=PLAIN,
    qk_pos_emb_head_dim=ROTATED,
    v_head_dim=VALUE,
)
BOTH = LatentKernel(LATENT + ROTATED, KERNELS["torch-cpu"].loaded(), KERNEL)


@pytest.fixture(params=[None, (1, 1), (60, 7)], ids=["whole", "one by one", "few at a time"])
def tiles(request, monkeypatch) -> None:
    """Scores at once, and keys of them at least."""
    if request.param:
        monkeypatch.setitem(torch_latent.SCORES_AT_ONCE, "cpu", request.param[0])
        monkeypatch.setattr(torch_latent, "FEWEST_KEYS", request.param[1])


@pytest.mark.parametrize("dtype", TORCH_LATENT.dtypes)
@pytest.mark.parametrize(("np", "ng"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
def test_it_equals_the_reference(dtype, np, ng, sq, sk):
    qkv = tensors(sq, sk, np=np, ng=ng, hv=11, b=2, dtype=dtype)
    contract.check_equals_reference(KERNEL, *qkv, tolerance=TOLERANCE[dtype])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("sq", "sk", "window"), BANDS)
def test_rows_see_the_last_keys_up_to_their_own_in_tiles_of_any_size(sq, sk, window):
    contract.check_band(KERNEL, *tensors(sq, sk, b=2, hv=24), window=window, tolerance=5e-5)


@pytest.mark.parametrize(("sq", "sk"), EMPTY)
def test_no_rows_or_no_keys_give_zero_and_minus_infinity(sq, sk):
    contract.check_empty(KERNEL, *tensors(sq, sk))


@pytest.mark.usefixtures("tiles")
def test_scores_of_any_size_do_not_overflow():
    query, key, value = tensors(5, 37)
    part = KERNEL(query * 1000, key, value, causal=True, softmax_scale=1.0)
    expected = reference.attention(query * 1000, key, value, causal=True, softmax_scale=1.0)
    contract.assert_same_partial(part, *expected, 5e-2)


def latent(seed: int = 0) -> Latent:
    weight = torch.randn(NUM_HEADS * (PLAIN + VALUE), LATENT, generator=torch.Generator().manual_seed(seed))
    return Latent(lambda: weight / 3, SHAPE)


def query_and_stored(sq: int, sk: int) -> tuple[Tensor, Tensor]:
    """Of sizes that make scores of a part up to 20 higher than of another."""
    generator = torch.Generator().manual_seed(sq)
    query = torch.randn(sq, 1, NUM_HEADS, PLAIN + ROTATED, generator=generator)
    stored = torch.randn(sk, 1, 1, LATENT + ROTATED, generator=generator)
    return query, stored * torch.linspace(0.1, 3, sk)[:, None, None, None]


@pytest.mark.parametrize("attention", [AbsorbedAttention, CheaperFormAttention])
@pytest.mark.parametrize("sq", [1, 9, 40])
def test_parts_in_either_form_are_attention_to_the_expanded_keys(attention, sq):
    """A causal part of the rows' own tokens, and sources of 1, 30 and 9 tokens that some rows read."""
    query, stored = query_and_stored(sq, sq + 40)
    own, sources = stored[:sq], stored[sq:].split([1, 30, 9])
    running = attention(BOTH, 0.3, query, latent())
    running.set_causal(0, sq, own, own[..., :0])
    for source in sources:
        running.add([(0, sq // 2), (sq // 2, sq)], source, source[..., :0])
    found = running.merged()
    key, value = latent().expanded(torch.cat((*sources, own)))
    expected = reference.attention(query, key, value, causal=True, softmax_scale=0.3)
    contract.assert_same_partial(found, *expected, 1e-4)


def test_few_rows_absorb_and_many_expand():
    running = CheaperFormAttention(BOTH, 0.3, query_and_stored(40, 1)[0], latent())
    assert running._absorbs(2, torch.empty(40, 1, 1, 1)) and not running._absorbs(
        40, torch.empty(40, 1, 1, 1)
    )


def test_rows_that_see_nothing_are_zero_whatever_the_form():
    for attention in (AbsorbedAttention, CheaperFormAttention):
        out, lse = attention(BOTH, 0.3, query_and_stored(3, 1)[0], latent()).merged()
        assert out.shape == (1, NUM_HEADS, 3, VALUE) and not out.any() and (lse == -torch.inf).all()
