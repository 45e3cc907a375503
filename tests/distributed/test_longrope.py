"""longrope: a sequence has the short factors or the long ones, from its first token to its last."""

import engine_uses
import pytest
import torch
from distributed import run_ranks
from models import MODELS, random_tokens
from ranks import on_engine
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.random_models import save_random_model
from checkpoints_tools.convert_hf_to_megatron import convert

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 5.0, 9.0, 20.0, 30.0, 40.0, 64.0],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = MODELS["llama"].to_dict() | {"rope_parameters": LONGROPE}
    directory = tmp_path_factory.mktemp("longrope")
    save_random_model(LlamaConfig.from_dict(config), directory / "hf")
    convert(directory / "hf", directory / "megatron")
    return directory


@pytest.fixture(scope="module", params=[1, 2])
def results(request, checkpoint):
    return run_ranks(request.param, on_engine, str(checkpoint / "megatron"), {}, engine_uses.of_two_lengths)[
        0
    ]


@pytest.mark.parametrize(
    ("name", "num_prompt"),
    [("short", 36), ("long", 49), ("without context", 60), ("short again", 36), ("grown beyond", 52)],
)
def test_requests_within_the_original_length_and_beyond_it_answer_as_transformers(
    checkpoint, results, name, num_prompt
):
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "hf", dtype=torch.float32).eval()
    tokens = random_tokens(num_prompt)
    with torch.inference_mode():
        for token in results[name].tokens:
            assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)
    assert len(tokens) > num_prompt


def test_a_context_is_encoded_for_one_of_them(results):
    cached = {name: result.num_cached_tokens for name, result in results.items() if name != "refused"}
    assert cached == {"short": 0, "long": 0, "without context": 0, "short again": 30, "grown beyond": 30}


def test_a_change_in_the_middle_of_an_answer_is_refused_with_the_bound(results):
    assert "36 context and query tokens + 14 generated tokens would pass 48 tokens" in results["refused"]
    assert "generate at most 13, or give more than 48" in results["refused"]
