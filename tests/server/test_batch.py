"""What an HTTP request gets when one of its answers ends badly."""

import asyncio

import pytest

from megatron_star.engine.request import StarResult, Timings
from megatron_star.server.batch import Batch
from megatron_star.server.errors import RequestError

TIMINGS = Timings(queue_s=0.0, context_encoding_s=0.0, query_s=0.0, ttft_s=0.0, tpot_s=0.0)


def ended(reason: str, error: str | None = None) -> StarResult:
    return StarResult(
        text="",
        tokens=[],
        logprobs=[],
        finish_reason=reason,
        num_context_tokens=0,
        num_query_tokens=1,
        mode="star",
        num_blocks=0,
        cache_hit=False,
        timings=TIMINGS,
        kv_bytes_per_rank=[0],
        kv_bytes_by_kind={"full": 0},
        error=error,
    )


@pytest.mark.parametrize(
    ("result", "status", "message"),
    [
        (ended("error", "the logits are not finite"), 500, "the logits are not finite"),
        (ended("cancelled"), 503, "the server stops"),
    ],
)
def test_an_answer_that_ends_badly_is_the_requests_error(result, status, message):
    async def wait() -> None:
        batch = Batch([], [None, None])
        batch.post(0, ended("length"))
        batch.post(1, result)
        await batch.wait()

    with pytest.raises(RequestError, match=message) as raised:
        asyncio.run(wait())
    assert raised.value.status == status
