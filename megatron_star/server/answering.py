"""What the wires share: waiting for answers while whoever asked is there, and the report on what was done."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from megatron_star.server.ask import Ask
from megatron_star.server.attention_report import attention_report
from megatron_star.server.batch import Batch
from megatron_star.server.errors import KINDS, RequestError
from megatron_star.server.record import record_of
from megatron_star.server.state import service_of


async def answered(ask: Ask, request: Request) -> Batch:
    """All results of what is asked; gives up when the client goes away.

    Raises:
        RequestError: it did (nobody reads this), or the request cannot be answered, or the server stops.
    """
    async with service_of(request).answer(ask, record_of(request.scope).tenant) as batch:
        results, gone = asyncio.ensure_future(batch.wait()), asyncio.ensure_future(until_gone(request))
        try:
            await asyncio.wait({results, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise RequestError(499, "the client went away")
            results.result()
        finally:
            results.cancel()
            gone.cancel()
            _record(request, batch)
    return batch


async def streamed(
    ask: Ask, request: Request, render: Callable[[Batch], AsyncIterator[str]]
) -> StreamingResponse:
    """What `render` makes of the answers, as server-sent events while they come.

    Raises:
        RequestError: the request cannot be answered.
    """
    async with AsyncExitStack() as stack:
        batch = await stack.enter_async_context(
            service_of(request).answer(ask, record_of(request.scope).tenant)
        )
        stream = _closing(render(batch), batch, request, stack.pop_all())
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _closing(
    chunks: AsyncIterator[str], batch: Batch, request: Request, stack: AsyncExitStack
) -> AsyncIterator[str]:
    """The chunks; when they end, or the client goes away, the batch is left, and what came of it is noted."""
    async with stack:
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            _record(request, batch)


async def until_gone(request: Request) -> None:
    """Until whoever asked has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _record(request: Request, batch: Batch) -> None:
    """Numbers of the answers, as far as they came, for the request's log line, and why they broke off."""
    record = record_of(request.scope)
    if batch.refusal:
        record.error = KINDS[batch.refusal.status]
    results = [result for result in batch.results if result]
    record.answers = batch.answers
    requests = [answer.request for answer in batch.answers]
    record.numbers = {
        "context_tokens": sum(len(asked.context_tokens) for asked in requests),
        "query_tokens": sum(len(asked.query_tokens) for asked in requests),
        "generated_tokens": sum(len(answer.tokens) for answer in batch.answers),
        "cache_hits": sum(result.cache_hit for result in results),
    }
    first_tokens = [result.timings for result in results if result.tokens]
    if first_tokens:
        seconds = max(timings.queue_s + timings.ttft_s for timings in first_tokens)
        record.numbers["ttft_seconds"] = round(seconds, 4)
    if len(results) < len(batch.answers):
        record.numbers["unfinished"] = len(batch.answers) - len(results)


def star_report(batch: Batch, index: int = 0) -> dict[str, Any]:
    """What was used for this answer of a batch that has ended, as `usage.star` says it."""
    result, split = batch.results[index], batch.splits[index // batch.num_choices]
    timings = result.timings
    return {
        "split": split.rule,
        "context_tokens": result.num_context_tokens,
        "query_tokens": result.num_query_tokens,
        "blocks": result.num_blocks,
        "mode": result.mode,
        "sizes": result.sizes,
        "cache_hit": result.cache_hit,
        "cached_tokens": result.num_cached_tokens,
        "proposed_tokens": result.num_proposed_tokens,
        "accepted_tokens": result.num_accepted_tokens,
        "kv_bytes": result.kv_bytes_by_kind,
        "queue_seconds": timings.queue_s,
        "encode_seconds": timings.context_encoding_s if result.num_context_tokens else 0.0,
        "ttft_seconds": timings.queue_s + timings.ttft_s,
        "tpot_seconds": timings.tpot_s,
        **attention_report(result.attention_map, batch.excerpts.get(index)),
    }
