"""A server on a GPU, asked by a client, against the same server on the CPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import WORDS

sys.path.append(str(Path(__file__).parents[1] / "server"))  # running_server
from running_server import start_server

QUESTION = {
    "model": "small",
    "prompt": WORDS * 2,
    "max_tokens": 12,
    "temperature": 0,
    "logprobs": 1,
    "star": {"query_tokens": 5},
}


@pytest.fixture(scope="module")
def ask(converted_with_tokenizer, tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """Asks a new server of a model twice: a new context, and one that is encoded already."""

    def ask(name: str, num_ranks: int, *arguments: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(name)
        options = ("--served-model-name", "small", "--star-block-size", "32", *arguments)
        server = start_server(converted_with_tokenizer(name)[1], folder, *options, num_ranks=num_ranks)
        try:
            server.wait_until_ready()
            answers = [server.post("/v1/completions", QUESTION) for _ in range(2)]
        finally:
            server.end()
        assert [answer.status_code for answer in answers] == [200, 200], server.log()
        return [answer.json()["choices"][0] for answer in answers]

    return ask


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "qwen3_moe"])
def test_a_server_on_a_gpu_gives_the_answers_of_one_on_the_cpu(ask, monkeypatch, name, num_ranks):
    """Two ranks share the GPU."""
    found = ask(name, num_ranks, "--distributed-backend", "gloo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for answer, expected in zip(found, ask(name, num_ranks), strict=True):
        assert answer["text"] == expected["text"] and answer["finish_reason"] == expected["finish_reason"]
        of_answers = [torch.tensor(each["logprobs"]["token_logprobs"]) for each in (answer, expected)]
        torch.testing.assert_close(*of_answers, atol=2e-3, rtol=2e-3)
