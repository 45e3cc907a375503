"""OpenAI's wire: /v1/completions, /v1/chat/completions and /v1/models."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from megatron_star.server.batch import Batch
from megatron_star.server.completion import CompletionService, Generation
from megatron_star.server.errors import RequestError
from megatron_star.server.json_body import CheckedBodyRoute
from megatron_star.server.openai_answers import (
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
from megatron_star.server.sampling import chosen_top_p, stop_texts
from megatron_star.server.schemas import ChatRequest, CompletionRequest, OpenAIFields, StarOptions

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
    options, prompts, n = body.star or StarOptions(), body.prompts(), body.n or 1
    tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens

    def build(splitter):
        return split_prompts(splitter, prompts, options, contexts=body.contexts, field="prompt")

    texts = [completion_text(service, prompt) if body.echo else "" for prompt in prompts for _ in range(n)]
    answers = CompletionAnswers(service, logprobs=body.logprobs is not None, echoes=texts)
    counts = {"num_prompts": len(prompts), "num_choices": n}
    return await _answer(
        request, body, answers, service.batch(build, options, _generation(body, tokens), **counts)
    )


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The assistant's next message, by the tokenizer's chat template."""
    service = service_of(request)
    _check_model(service, body.model)
    options = body.star or StarOptions()
    tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS

    def build(splitter):
        return [splitter.split_chat(body.messages, options)]

    answers = ChatAnswers(service, logprobs=bool(body.logprobs))
    counts = {"num_prompts": 1, "num_choices": body.n or 1}
    return await _answer(
        request, body, answers, service.batch(build, options, _generation(body, tokens), **counts)
    )


async def _answer(request: Request, body: OpenAIFields, answers: Answers, entering: Any) -> Response:
    model = request.app.state.settings.model_name
    async with AsyncExitStack() as stack:
        batch = await stack.enter_async_context(entering)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = stream_chunks(batch, answers, model, include_usage=include_usage)
            stream = _closing(chunks, batch, request, stack.pop_all())
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        results = await results_of(batch, request)
    choices = [answers.choice(index, result) for index, result in enumerate(results)]
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


def _generation(body: CompletionRequest | ChatRequest, num_tokens: int) -> Generation:
    return Generation(
        num_tokens=num_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=chosen_top_p(body.top_k, body.top_p),
        stop=stop_texts(body.stop),
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
