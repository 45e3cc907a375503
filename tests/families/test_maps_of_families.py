"""Attention maps where attention is not plain: soft caps, sinks, layers with windows, latents."""

import pytest
import torch
from cases import NUM_CONTEXT, NUM_QUERY
from dense import FULL, hugging_face_model, kinds_of_layers
from distributed import run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from random_models import VOCAB_SIZE
from ranks import generate

from megatron_star.algorithm.attention_map import piece_edges
from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest

TOKENS = torch.randint(
    VOCAB_SIZE, (NUM_CONTEXT + NUM_QUERY,), generator=torch.Generator().manual_seed(4)
).tolist()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_maps_are_those_of_hugging_faces_attention(converted, name):
    request = StarRequest(
        context_tokens=TOKENS[:NUM_CONTEXT],
        query_tokens=TOKENS[NUM_CONTEXT:],
        sampling=SamplingParams(num_tokens_to_generate=6, top_k=1),
        star=StarConfig(mode="exact"),
        attention_map=True,
    )
    model = converted(name)
    ((result,),) = run_ranks(2, generate, str(model.megatron), 1, [[request]])[0]

    dense, tokens = hugging_face_model(model.hf), [*TOKENS, *result.tokens[:-1]]
    with torch.inference_mode():
        of_layers = dense(torch.tensor([tokens]), output_attentions=True).attentions
    kinds = kinds_of_layers(dense.config)
    full = [each for each, kind in zip(of_layers, kinds, strict=True) if kind == FULL]
    assert full
    attention = torch.cat(full)[:, :, NUM_CONTEXT + NUM_QUERY - 1 :, :NUM_CONTEXT]
    masses, peaks = attention.mean((0, 1, 2)), attention.amax((0, 1))
    assert [piece.start for piece in result.attention_map.pieces] == piece_edges(NUM_CONTEXT)[:-1]
    for start, end, mass, peak in result.attention_map.pieces:
        assert mass == pytest.approx(masses[start:end].sum().item(), abs=1e-4)
        assert peak == pytest.approx(peaks[:, start:end].amax(1).mean().item(), abs=1e-4)
