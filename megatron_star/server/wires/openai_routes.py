"""OpenAI's wire: /v1/models, and what its routes share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from megatron_star.server.answering import answered, streamed
from megatron_star.server.ask import Ask
from megatron_star.server.batch import Batch
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES, RequestError
from megatron_star.server.request_id import named_request
from megatron_star.server.service import CompletionService
from megatron_star.server.state import server_of, service_of
from megatron_star.server.wires.generation_fields import GenerationFields, StreamOptions
from megatron_star.server.wires.openai_stream import AnswerNames, Answers, render_stream, render_whole

router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that runs here, under each of its names."""
    names = server_of(request).settings.model_names
    return {"object": "list", "data": [_model(request, name) for name in names]}


@router.get("/models/{model:path}")
async def model(model: str, request: Request) -> dict[str, Any]:
    """The model, if it is the one that runs here."""
    check_model(request, model)
    return _model(request, model)


async def answer_with(
    request: Request,
    body: GenerationFields,
    ask: Ask,
    answers_of: Callable[[CompletionService, Batch], Answers],
) -> Response:
    """The answers, whole or as a stream.

    answers_of: how those of a batch are rendered.
    """
    service = service_of(request)
    names = AnswerNames(
        named_request(request.scope, body.request_id),
        server_of(request).settings.model_name,
    )
    token_ids = bool(body.return_token_ids)
    if body.stream:
        options = body.stream_options or StreamOptions()

        def rendered(batch: Batch) -> AsyncIterator[str]:
            return render_stream(batch, answers_of(service, batch), names, options, token_ids=token_ids)

        return await streamed(ask, request, rendered)
    batch = await answered(ask, request)
    answers = answers_of(service, batch)
    return JSONResponse(await asyncio.to_thread(render_whole, batch, answers, names, token_ids=token_ids))


def check_model(request: Request, name: str) -> None:
    """Raises RequestError if this is not the model that runs here."""
    settings = server_of(request).settings
    if name not in settings.model_names:
        raise RequestError(
            404, f"model: there is no {name[:100]!r} here; the model is {settings.model_name!r}", "model"
        )


def _model(request: Request, name: str) -> dict[str, Any]:
    """As OpenAI's, with vLLM's `max_model_len`. The root of all names is the first: no path is shown."""
    server = server_of(request)
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "megatron-star",
        "root": server.settings.model_name,
        "parent": None,
        "permission": [_permission(name, server.created)],
        "max_model_len": service_of(request).engine.max_sequence_length,
    }


def _permission(name: str, created: int) -> dict[str, Any]:
    """What clients of OpenAI's first API look for."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
