"""OpenAI's wire: /v1/models, and what its routes share."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from megatron_star.server.answering import answered, streamed
from megatron_star.server.ask import Ask
from megatron_star.server.batch import Batch
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES, RequestError
from megatron_star.server.service import CompletionService
from megatron_star.server.state import server_of, service_of
from megatron_star.server.wires.generation_fields import GenerationFields, StreamOptions
from megatron_star.server.wires.openai_stream import Answers, render_stream, render_whole

router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that runs here."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/models/{model:path}")
async def model(model: str, request: Request) -> dict[str, Any]:
    """The model, if it is the one that runs here."""
    check_model(request, model)
    return _model(request)


async def answer_with(
    request: Request,
    body: GenerationFields,
    ask: Ask,
    answers_of: Callable[[CompletionService, Batch], Answers],
) -> Response:
    """The answers, whole or as a stream.

    answers_of: how those of a batch are rendered.
    """
    service, model = service_of(request), server_of(request).settings.model_name
    if body.stream:
        options = body.stream_options or StreamOptions()
        return await streamed(
            ask, request, lambda batch: render_stream(batch, answers_of(service, batch), model, options)
        )
    batch = await answered(ask, request)
    answers = answers_of(service, batch)
    return JSONResponse(await asyncio.to_thread(render_whole, batch, answers, model))


def check_model(request: Request, name: str) -> None:
    """Raises RequestError if this is not the model that runs here."""
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
