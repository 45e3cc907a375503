"""A server whose experts are spread over its ranks: the same answers, and what /metrics says of experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import start_server
from small_tokenizers import WORDS

NUM_QUERY_TOKENS, TOP_K = 5, 2
QUESTION = {
    "model": "experts",
    "prompt": WORDS * 2,
    "max_tokens": 6,
    "temperature": 0,
    "logprobs": 1,
    "star": {"query_tokens": NUM_QUERY_TOKENS},
}


class Served(NamedTuple):
    """An answer, and each metric on experts by its name, layer and the rest of its labels."""

    answer: dict[str, Any]
    metrics: dict[tuple[str, ...], float]


@pytest.fixture
def served(converted_with_tokenizer, tmp_path) -> Callable[..., Served]:
    """Asks a server of so many ranks, and ends it.

    Its model has three layers with four experts each, of which a token chooses two.
    """

    checkpoint = converted_with_tokenizer("qwen3_moe").megatron

    def ask(num_ranks: int, *arguments: str) -> Served:
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        arguments = ("--served-model-name", "experts", "--star-block-size", "32", *arguments)
        server = start_server(checkpoint, folder, *arguments, num_ranks=num_ranks)
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
    prefix = "megatron_star_expert_"
    return {
        (
            sample.name.removeprefix(prefix),
            *(sample.labels[key] for key in sorted(sample.labels)[::-1]),
        ): value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(prefix)
        for value in [sample.value]
    }


def test_two_ranks_with_half_of_the_experts_each_answer_and_count_as_one_rank_does(served):
    alone = served(1, "--metrics-per-expert")
    spread = served(2, "--metrics-per-expert", "--expert-model-parallel-size", "2")

    (expected,), (choice,) = alone.answer["choices"], spread.answer["choices"]
    assert choice["text"] == expected["text"]
    assert choice["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(
        expected["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert spread.answer["usage"]["star"]["blocks"] >= 3

    counted = {key[1:]: value for key, value in spread.metrics.items() if key[0] == "tokens_total"}
    assert counted == {key[1:]: value for key, value in alone.metrics.items() if key[0] == "tokens_total"}
    usage = spread.answer["usage"]
    num_fed = usage["completion_tokens"] - 1  # nothing comes after the last token
    rows = dict.fromkeys("01", usage["prompt_tokens"] + num_fed) | {"2": NUM_QUERY_TOKENS + num_fed}
    for layer, num_rows in rows.items():  # nobody needs what the last layer makes of a context
        of_layer = [counted[layer, str(expert)] for expert in range(4)]
        assert sum(of_layer) == TOP_K * num_rows
        assert spread.metrics["busiest_over_mean", layer] == pytest.approx(4 * max(of_layer) / sum(of_layer))
    of_ranks = [
        sum(value for (_, expert), value in counted.items() if int(expert) // 2 == rank) for rank in range(2)
    ]
    assert [spread.metrics["rank_tokens_total", rank] for rank in "01"] == of_ranks
