"""OpenAI's wire: /v1/completions, /v1/chat/completions and /v1/models."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from megatron_star.server.batch import Batch
from megatron_star.server.completion import CompletionService, Generation
from megatron_star.server.errors import RequestError
from megatron_star.server.generation_fields import filters, stop_texts
from megatron_star.server.json_body import CheckedBodyRoute
from megatron_star.server.openai_answers import (
    PROMPT_LOGPROBS,
    Answers,
    ChatAnswers,
    CompletionAnswers,
    completion_text,
    envelope,
    stream_chunks,
    usage,
)
from megatron_star.server.requests import (
    ERROR_RESPONSES,
    note_in_log,
    results_of,
    service_of,
    split_prompts,
)
from megatron_star.server.schemas import ChatRequest, CompletionRequest, OpenAIFields, StreamOptions
from megatron_star.server.star_options import StarOptions

DEFAULT_COMPLETION_TOKENS = 16
DEFAULT_CHAT_TOKENS = 512
router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that runs here."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/models/{model:path}")
async def model(model: str, request: Request) -> dict[str, Any]:
    """The model, if it is the one that runs here."""
    _check_model(service_of(request), model)
    return _model(request)


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Completions of one or more prompts."""
    service = service_of(request)
    _check_model(service, body.model)
    if body.echo and body.logprobs is not None:
        raise RequestError(400, PROMPT_LOGPROBS, "logprobs")
    options, prompts, n = body.star or StarOptions(), body.prompts(), body.n or 1

    echoes: list[str] = []

    def build(splitter):
        if body.echo:
            echoes.extend(completion_text(service, prompt) for prompt in prompts for _ in range(n))
        return split_prompts(splitter, prompts, options, contexts=body.contexts, field="prompt")

    def answers(batch: Batch) -> CompletionAnswers:
        return CompletionAnswers(service, batch, logprobs=body.logprobs, echoes=echoes)

    generation = _generation(body, body.max_tokens, default=DEFAULT_COMPLETION_TOKENS)
    counts = {"num_prompts": len(prompts), "num_choices": n}
    return await _answer(request, body, answers, service.batch(build, options, generation, **counts))


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The assistant's next message, by the tokenizer's chat template."""
    service = service_of(request)
    _check_model(service, body.model)
    options = body.star or StarOptions()

    def build(splitter):
        return [splitter.split_chat([message.for_template() for message in body.messages], options)]

    def answers(batch: Batch) -> ChatAnswers:
        return ChatAnswers(service, logprobs=bool(body.logprobs), top_logprobs=bool(body.top_logprobs))

    asked = body.max_completion_tokens or body.max_tokens
    generation = _generation(body, asked, default=DEFAULT_CHAT_TOKENS)
    counts = {"num_prompts": 1, "num_choices": body.n or 1}
    return await _answer(request, body, answers, service.batch(build, options, generation, **counts))


async def _answer(
    request: Request, body: OpenAIFields, answers_of: Callable[[Batch], Answers], entering: Any
) -> Response:
    model = request.app.state.settings.model_name
    async with AsyncExitStack() as stack:
        batch = await stack.enter_async_context(entering)
        answers = answers_of(batch)
        if body.stream:
            chunks = stream_chunks(batch, answers, model, body.stream_options or StreamOptions())
            stream = _closing(chunks, batch, request, stack.pop_all())
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        await results_of(batch, request)
    choices = await asyncio.to_thread(
        lambda: [answers.choice(index, answer) for index, answer in enumerate(batch.answers)]
    )
    return JSONResponse(envelope(answers, model, chunk=False) | {"choices": choices, "usage": usage(batch)})


async def _closing(
    chunks: AsyncIterator[str], batch: Batch, request: Request, stack: AsyncExitStack
) -> AsyncIterator[str]:
    """The chunks; when they end, or the client goes away, the batch is left, and what came of it is noted."""
    async with stack:
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            note_in_log(request, batch)


def _generation(body: CompletionRequest | ChatRequest, num_tokens: int | None, *, default: int) -> Generation:
    top_k, top_p = filters(body.top_k, body.top_p, zero_is_off=False)
    return Generation(
        num_tokens=num_tokens or default,
        cut_to_room=num_tokens is None,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop_texts(body.stop),
        end_tokens=() if body.ignore_eos else None,
        more_end_tokens=tuple(body.stop_token_ids or ()),
        seed=body.seed,
    )


def _check_model(service: CompletionService, name: str) -> None:
    served = service.settings.model_name
    if name != served:
        raise RequestError(404, f"model: there is no {name[:100]!r} here; the model is {served!r}", "model")


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {
        "id": state.settings.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "megatron-star",
        "max_model_len": service_of(request).engine.max_sequence_length,
    }
