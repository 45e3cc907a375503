"""OpenAI's wire: /v1/completions, /v1/chat/completions and /v1/models."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from megatron_star.server.answering import answered, streamed
from megatron_star.server.ask import Ask, ChatPrompt, Generation, filters, stop_texts, with_contexts
from megatron_star.server.batch import Batch
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES, RequestError
from megatron_star.server.service import CompletionService
from megatron_star.server.star_options import StarOptions
from megatron_star.server.state import server_of, service_of
from megatron_star.server.wires.openai_answers import (
    Answers,
    ChatAnswers,
    CompletionAnswers,
    render_stream,
    render_whole,
)
from megatron_star.server.wires.openai_schemas import (
    ChatRequest,
    CompletionRequest,
    OpenAIFields,
    StreamOptions,
)

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
    _check_model(request, model)
    return _model(request)


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Completions of one or more prompts."""
    _check_model(request, body.model)
    answers_of = partial(CompletionAnswers, logprobs=body.logprobs)
    return await _answer(request, body, parse_completion(body), answers_of)


def parse_completion(body: CompletionRequest) -> Ask:
    """What a body of /v1/completions asks. Raises FieldError."""
    body.check_echo()
    star, prompts = body.star or StarOptions(), body.prompts()
    return Ask(
        prompts=with_contexts(prompts, body.contexts, star, field="prompt"),
        star=star,
        generation=_generation(body, body.max_tokens, default=DEFAULT_COMPLETION_TOKENS),
        num_choices=body.n or 1,
        echoed=prompts if body.echo else (),
    )


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The assistant's next message, by the tokenizer's chat template."""
    _check_model(request, body.model)

    def answers_of(service: CompletionService, batch: Batch) -> ChatAnswers:
        return ChatAnswers(service, logprobs=bool(body.logprobs), top_logprobs=bool(body.top_logprobs))

    return await _answer(request, body, parse_chat(body), answers_of)


def parse_chat(body: ChatRequest) -> Ask:
    """What a body of /v1/chat/completions asks."""
    num_tokens = body.max_completion_tokens or body.max_tokens
    return Ask(
        prompts=[ChatPrompt([message.for_template() for message in body.messages])],
        star=body.star or StarOptions(),
        generation=_generation(body, num_tokens, default=DEFAULT_CHAT_TOKENS),
        num_choices=body.n or 1,
    )


async def _answer(
    request: Request, body: OpenAIFields, ask: Ask, answers_of: Callable[[CompletionService, Batch], Answers]
) -> Response:
    """`answers_of`: how the answers of a batch are rendered."""
    service, model = service_of(request), server_of(request).settings.model_name
    if body.stream:
        options = body.stream_options or StreamOptions()
        return await streamed(
            ask, request, lambda batch: render_stream(batch, answers_of(service, batch), model, options)
        )
    batch = await answered(ask, request)
    answers = answers_of(service, batch)
    return JSONResponse(await asyncio.to_thread(render_whole, batch, answers, model))


def _generation(body: CompletionRequest | ChatRequest, num_tokens: int | None, *, default: int) -> Generation:
    return Generation(
        num_tokens=num_tokens or default,
        cut_to_room=num_tokens is None,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        filters=filters(body.top_k, body.top_p, zero_is_off=False),
        stop=stop_texts(body.stop),
        end_tokens=() if body.ignore_eos else None,
        more_end_tokens=tuple(body.stop_token_ids or ()),
        seed=body.seed,
    )


def _check_model(request: Request, name: str) -> None:
    served = server_of(request).settings.model_name
    if name != served:
        raise RequestError(404, f"model: there is no {name[:100]!r} here; the model is {served!r}", "model")


def _model(request: Request) -> dict[str, Any]:
    server = server_of(request)
    return {
        "id": server.settings.model_name,
        "object": "model",
        "created": server.created,
        "owned_by": "megatron-star",
        "max_model_len": service_of(request).engine.max_sequence_length,
    }
