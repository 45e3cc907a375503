"""Attention maps are those of the Hugging Face model, whatever ranks hold the context."""

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from map_uses import beside_others, cancelled_while_mapped, looks_with_programs
from megatron.core.inference.sampling_params import SamplingParams
from models import additive_mask, random_tokens
from ranks import TIMEOUT, generate, on_engine
from transformers import AutoModelForCausalLM

from megatron_star.algorithm.attention_map import TOKENS_OF_A_PIECE, Looks, num_pieces, piece_edges
from megatron_star.config import StarConfig
from megatron_star.engine.attention_map import MOST_PIECES, AttentionMap
from megatron_star.engine.map_maker import MOST_OBSERVED_ROWS
from megatron_star.engine.request import StarRequest, StarResult

CONTEXT, QUERY = random_tokens(149), random_tokens(7, seed=1)
STARS = [StarConfig(mode="exact"), StarConfig(block_size=20, anchor_size=5)]


def request_for(star: StarConfig, num_tokens: int = 9, **fields) -> StarRequest:
    sampling = SamplingParams(num_tokens_to_generate=num_tokens, top_k=1)
    return StarRequest(
        context_tokens=CONTEXT, query_tokens=QUERY, sampling=sampling, star=star, attention_map=True, **fields
    )


def attention_of_hugging_face(hf: Path, result: StarResult, star: StarConfig) -> torch.Tensor:
    """[layers, heads, rows, context tokens] of the rows that chose the answer's tokens."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = [*CONTEXT, *QUERY, *result.tokens[:-1]]
    mask = additive_mask(len(CONTEXT), len(tokens), star)
    with torch.inference_mode():
        all_rows = model(torch.tensor([tokens]), attention_mask=mask, output_attentions=True).attentions
    return torch.cat(all_rows)[:, :, len(CONTEXT) + len(QUERY) - 1 :, : len(CONTEXT)]


@pytest.mark.parametrize(
    ("model", "tp_size", "cp_size"), [("llama", 1, 1), ("qwen3", 1, 2), ("llama", 1, 3), ("qwen2", 2, 1)]
)
def test_masses_and_peaks_are_those_of_hugging_faces_attention(checkpoints, model, tp_size, cp_size):
    hf, megatron = checkpoints(model)
    batches = [[request_for(star)] for star in STARS]
    answered = run_ranks(tp_size * cp_size, generate, str(megatron), tp_size, batches)[0]
    edges = piece_edges(len(CONTEXT))
    for star, (result,) in zip(STARS, answered, strict=True):
        attention = attention_of_hugging_face(hf, result, star)
        masses, peaks = attention.mean((0, 1, 2)), attention.amax((0, 1))
        found = result.attention_map
        assert found.num_rows == 9 and [piece.start for piece in found.pieces] == edges[:-1]
        for start, end, mass, peak in found.pieces:
            assert mass == pytest.approx(masses[start:end].sum().item(), abs=1e-4)
            assert peak == pytest.approx(peaks[:, start:end].amax(1).mean().item(), abs=1e-4)
        assert found.elsewhere == pytest.approx(1 - masses.sum().item(), abs=1e-4)


def test_a_long_answer_is_observed_at_every_so_many_tokens(checkpoints):
    hf, megatron = checkpoints("llama")
    ask = request_for(STARS[0], num_tokens=2 * MOST_OBSERVED_ROWS + 5)
    ((result,),) = run_ranks(1, generate, str(megatron), 1, [[ask]])[0]
    rows = attention_of_hugging_face(hf, result, STARS[0])[:, :, ::3]
    assert result.attention_map.num_rows == rows.size(2)
    found = sum(piece.mass for piece in result.attention_map.pieces)
    assert found == pytest.approx(rows.sum(-1).mean().item(), abs=1e-4)


def test_maps_beside_other_sequences_and_an_extended_context_change_nothing(checkpoints):
    _, megatron = checkpoints("qwen3")
    together, alone, stats = run_ranks(
        2, on_engine, str(megatron), {"max_wait_seconds": 1e-6}, beside_others
    )[0]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        if other.attention_map:
            assert len(one.attention_map.pieces) == len(other.attention_map.pieces)
            for piece, expected in zip(one.attention_map.pieces, other.attention_map.pieces, strict=True):
                assert piece == pytest.approx(expected, abs=1e-4)
        else:
            assert one.attention_map is None
    assert stats["running"] == 0 and any(result.num_accepted_tokens for result in together)


def test_whoever_gives_up_during_the_map_has_the_answer_without_it(checkpoints):
    _, megatron = checkpoints("qwen3")
    limits = {"max_wait_seconds": 1e-6}
    results, running = run_ranks(2, on_engine, str(megatron), limits, cancelled_while_mapped, TIMEOUT, False)[
        0
    ]
    assert [result.finish_reason for result in results] == ["length", "length"]
    assert results[0].attention_map is None and results[1].attention_map is not None
    assert running == 0


def test_rows_for_which_there_are_compiled_layers_are_observed_all_the_same(checkpoints):
    _, megatron = checkpoints("llama")
    ((plain, with_programs),) = run_ranks(1, looks_with_programs, str(megatron))
    assert plain.masses.sum() > 1
    for one, other in zip(plain, with_programs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 18, 4000, 100_001])
def test_pieces_cover_a_context_of_any_length_and_are_small_where_it_was_looked_at(num_tokens):
    count, needle = num_pieces(num_tokens), num_pieces(num_tokens) * 2 // 3
    assert len(piece_edges(num_tokens)) == count + 1
    peaks = torch.full((2, count), 0.01)
    peaks[:, needle : needle + 1] = 0.5
    masses = torch.full((count,), 2 * 0.6 / max(1, count))
    found = AttentionMap.of_looks(num_tokens, [Looks(masses / 2, peaks[:1]), Looks(masses / 2, peaks[1:])])
    assert len(found.pieces) == min(count, MOST_PIECES)
    bounds = [0, *(piece.end for piece in found.pieces)]
    assert [piece.start for piece in found.pieces] == bounds[:-1] and bounds[-1] == num_tokens
    assert sum(piece.mass for piece in found.pieces) + found.elsewhere == pytest.approx(1)
    if count > 1:
        highest = max(found.pieces, key=lambda piece: piece.peak)
        assert highest.start == piece_edges(num_tokens)[needle]
        assert highest.end - highest.start <= TOKENS_OF_A_PIECE and found.pieces[0].end == 1
