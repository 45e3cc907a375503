"""What the routes share: the service behind a request, waiting for answers, the report on what was done."""

import asyncio
from typing import Any

from fastapi import Request

from megatron_star.engine.request import StarResult
from megatron_star.server.batch import Batch
from megatron_star.server.completion import CompletionService
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.errors import KINDS, RequestError
from megatron_star.server.schemas import ErrorBody
from megatron_star.server.star_options import StarOptions
from megatron_star.text.prompt import SplitPrompt

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; `param` names the field."},
    503: {"model": ErrorBody, "description": "Loading, draining or stopped; see Retry-After."},
}


def service_of(request: Request) -> CompletionService:
    """The service; admission lets nobody in before there is one."""
    service = request.app.state.server.service
    assert service is not None
    return service


def split_prompts(
    splitter: PromptSplitter,
    prompts: list[str] | list[list[int]],
    options: StarOptions,
    *,
    contexts: list[str] | None,
    add_bos: bool = False,
    field: str,
) -> list[SplitPrompt]:
    """Each prompt with its context: the only one, its own, or none."""
    if contexts and (options.query_tokens is not None or options.separator is not None):
        raise RequestError(400, "contexts: leave out star.query_tokens and star.separator", "contexts")
    shared = contexts * len(prompts) if contexts and len(contexts) == 1 else contexts
    return [
        splitter.split(prompt, options, context=context, add_bos=add_bos, field=field)
        for prompt, context in zip(prompts, shared or [None] * len(prompts), strict=True)
    ]


async def results_of(batch: Batch, request: Request) -> list[StarResult]:
    """Wait for all answers; gives up when the client goes away.

    Raises:
        RequestError: it did (nobody reads this), or the server stops.
    """
    answers, gone = asyncio.ensure_future(batch.wait()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise RequestError(499, "the client went away")
        answers.result()
    finally:
        answers.cancel()
        gone.cancel()
        note_in_log(request, batch)
    return batch.results


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def note_in_log(request: Request, batch: Batch) -> None:
    """Add numbers of the answers, as far as they came, to the request's log line, and why they broke off."""
    if batch.refusal:
        request.scope["star_error"] = KINDS[batch.refusal.status]
    results = [result for result in batch.results if result]
    requests = [answer.request for answer in batch.answers]
    request.scope["star_log"] = {
        "context_tokens": sum(len(asked.context_tokens) for asked in requests),
        "query_tokens": sum(len(asked.query_tokens) for asked in requests),
        "generated_tokens": sum(len(answer.tokens) for answer in batch.answers),
        "cache_hits": sum(result.cache_hit for result in results),
    }
    first_tokens = [result.timings for result in results if result.tokens]
    if first_tokens:
        seconds = max(timings.queue_s + timings.ttft_s for timings in first_tokens)
        request.scope["star_log"]["ttft_seconds"] = round(seconds, 4)
    if len(results) < len(batch.answers):
        request.scope["star_log"]["unfinished"] = len(batch.answers) - len(results)


def star_report(result: StarResult, split: SplitPrompt) -> dict[str, Any]:
    """What was used for one answer, as `usage.star` says it."""
    timings = result.timings
    return {
        "split": split.rule,
        "context_tokens": result.num_context_tokens,
        "query_tokens": result.num_query_tokens,
        "blocks": result.num_blocks,
        "mode": result.mode,
        "cache_hit": result.cache_hit,
        "cached_tokens": result.num_cached_tokens,
        "queue_seconds": timings.queue_s,
        "encode_seconds": timings.context_encoding_s if result.num_context_tokens else 0.0,
        "ttft_seconds": timings.queue_s + timings.ttft_s,
        "tpot_seconds": timings.tpot_s,
    }
