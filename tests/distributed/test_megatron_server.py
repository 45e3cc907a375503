"""Megatron's own server class holds our engine and answers over HTTP."""

import json
import socket
import threading
import urllib.error
import urllib.request
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from megatron.core.inference import communication_utils
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_server import tokenization
from megatron.core.inference.text_generation_server.text_generation_server import MegatronServer
from ranks import ENGINE_LIMITS, load
from transformers import AutoTokenizer
from werkzeug.serving import make_server

from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.megatron_engine import MegatronEngine

pytestmark = pytest.mark.smollm2
PROMPT = "The sky is blue. " * 40 + "The grass is green. The sky is"


class _TorchOnCpu:
    """torch, but for the device of new tensors."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def tensor(self, data: list, *, dtype: torch.dtype, device: str) -> torch.Tensor:
        """A tensor on the CPU."""
        return torch.tensor(data, dtype=dtype)


def serve_and_ask(checkpoint: str, tokenizer_directory: str) -> list[dict]:
    """Answers of a real MegatronServer to PUT /api and POST /completions, and the engine's own."""
    # All that is replaced, and for this call alone: Megatron's server puts its tensors on a GPU and asserts
    # that they are.
    with (
        patch.object(communication_utils, "_is_cuda", lambda tensor: None),
        patch.object(tokenization, "torch", _TorchOnCpu()),
    ):
        return _served(checkpoint, tokenizer_directory)


def what_stays_replaced() -> list[str]:
    """What of Megatron this rank still has in another form."""
    left = {"_is_cuda": communication_utils._is_cuda.__name__, "torch": tokenization.torch.__name__}
    return [name for name, found in left.items() if found != name]


def _served(checkpoint: str, tokenizer_directory: str) -> list[dict]:
    star_model, groups = load(checkpoint, 1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    engine = StarEngine(star_model, tokenizer, groups.control, **ENGINE_LIMITS)
    megatron_engine = MegatronEngine(engine, StarConfig(block_size=64), num_query_tokens=16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_server("127.0.0.1", port, MegatronServer(megatron_engine).app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = {"prompts": [PROMPT], "tokens_to_generate": 4, "top_k": 1, "logprobs": True}
    completion = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    answers = [
        _ask("PUT", port, "/api", api),
        _ask("POST", port, "/completions", completion),
    ]
    greedy = SamplingParams(top_k=1, num_tokens_to_generate=4)
    (direct,) = megatron_engine.generate(prompts=[PROMPT], sampling_params=greedy)
    answers.append({"tokens": direct.generated_tokens.tolist()})
    server.shutdown()
    engine.stop()
    return answers


def _ask(method: str, port: int, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=json.dumps(body).encode(),
        method=method,
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read().decode()}


def test_megatrons_server_answers_with_our_engine(smollm2):
    hf, megatron = smollm2
    ((api, completion, direct),) = run_ranks(1, serve_and_ask, str(megatron), str(hf))
    assert run_ranks(1, what_stays_replaced) == [[]]
    (text,), (tokens,) = api["text"], api["tokens"]
    assert text.startswith(PROMPT) and len(text) > len(PROMPT)
    assert tokens[-4:] == direct["tokens"]
    assert "".join(api["segments"][0]) == text
    logprobs = api["logprobs"][0]
    assert logprobs[:-4] == [None] * (len(tokens) - 5) and all(value <= 0 for value in logprobs[-4:])
    assert completion["choices"][0]["text"] == text[len(PROMPT) :]
