"""A server whose experts are spread over its ranks: the same answers, and what /metrics says of experts."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import start_server
from small_tokenizers import WORDS

NUM_QUERY_TOKENS = 5
QUESTION = {
    "model": "experts",
    "prompt": WORDS * 2,
    "max_tokens": 6,
    "temperature": 0,
    "logprobs": 1,
    "star": {"query_tokens": NUM_QUERY_TOKENS},
}


class Experts(NamedTuple):
    """Of a model of `random_models`: how many experts its layers have, and how many a token chooses."""

    layers: tuple[int, ...]
    last_layer: int
    num_experts: int
    top_k: int


MODELS = {"qwen3_moe": Experts((0, 1, 2), 2, 4, 2), "deepseek_v3": Experts((1,), 1, 8, 4)}


class Served(NamedTuple):
    """An answer, and each metric on experts by its name, layer and the rest of its labels."""

    answer: dict[str, Any]
    metrics: dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def served(converted_with_tokenizer, tmp_path_factory) -> Callable[..., Served]:
    """What a server of a model on so many ranks says; it is started and asked once for all tests."""

    @cache
    def ask(name: str, num_ranks: int, *arguments: str) -> Served:
        folder = tmp_path_factory.mktemp(f"{name}-{num_ranks}")
        options = ("--served-model-name", "experts", "--star-block-size", "32", "--metrics-per-expert")
        checkpoint = converted_with_tokenizer(name).megatron
        server = start_server(checkpoint, folder, *options, *arguments, num_ranks=num_ranks)
        try:
            server.wait_until_ready(240)
            answer = server.post("/v1/completions", QUESTION)
            assert answer.status_code == 200, answer.text
            return Served(answer.json(), expert_metrics(httpx.get(f"{server.url}/metrics").text))
        finally:
            server.end()

    return ask


def expert_metrics(text: str) -> dict[tuple[str, ...], float]:
    """Those on experts."""
    prefix, found = "megatron_star_expert_", {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                labels = [
                    sample.labels[key] for key in ("layer", "expert", "ep_rank") if key in sample.labels
                ]
                found[sample.name.removeprefix(prefix), *labels] = sample.value
    return found


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_with_half_of_the_experts_each_answer_and_count_as_one_rank_does(served, name):
    alone, spread = served(name, 1), served(name, 2, "--expert-model-parallel-size", "2")

    (expected,), (choice,) = alone.answer["choices"], spread.answer["choices"]
    assert choice["text"] == expected["text"]
    assert choice["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(
        expected["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert spread.answer["usage"]["star"]["blocks"] >= 3
    assert counted(spread) == counted(alone)


@pytest.mark.parametrize("name", MODELS)
def test_metrics_have_each_choice_of_each_token_once(served, name):
    experts, spread = MODELS[name], served(name, 2, "--expert-model-parallel-size", "2")
    counts, usage = counted(spread), spread.answer["usage"]
    num_fed = usage["completion_tokens"] - 1  # nothing comes after the last token
    for layer in experts.layers:
        # Nobody needs what the last layer makes of a context.
        begin = NUM_QUERY_TOKENS if layer == experts.last_layer else usage["prompt_tokens"]
        of_layer = [counts[str(layer), str(expert)] for expert in range(experts.num_experts)]
        assert sum(of_layer) == experts.top_k * (begin + num_fed)
        busiest = max(of_layer) / (sum(of_layer) / experts.num_experts)
        assert spread.metrics["busiest_over_mean", str(layer)] == pytest.approx(busiest)
    half = experts.num_experts // 2
    of_ranks = [sum(n for (_, expert), n in counts.items() if int(expert) // half == rank) for rank in (0, 1)]
    assert [spread.metrics["rank_tokens_total", rank] for rank in "01"] == of_ranks


def counted(served: Served) -> dict[tuple[str, ...], float]:
    """Tokens by layer and expert."""
    return {key[1:]: value for key, value in served.metrics.items() if key[0] == "tokens_total"}
