"""/v1/contexts: contexts that are sent once, encoded ahead, and named in requests by their ids."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from megatron_star.server.answering import until_gone
from megatron_star.server.checked_route import BodyOrFormRoute, form_description
from megatron_star.server.contexts import Context
from megatron_star.server.encoding_ahead import start_encoding
from megatron_star.server.errors import ERROR_RESPONSES, RequestError, error_body
from megatron_star.server.kept_context import KeptContext
from megatron_star.server.record import record_of
from megatron_star.server.service import CompletionService
from megatron_star.server.star_options import StarOptions
from megatron_star.server.state import service_of
from megatron_star.server.wires.context_schema import (
    DAY,
    ContextList,
    ContextObject,
    ContextRequest,
    DeletedContext,
)

SECONDS_BETWEEN_EVENTS = 0.5
FORM = form_description({"type": "string", "description": "the other fields of the JSON body, as JSON"})
router = APIRouter(route_class=BodyOrFormRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["contexts"])


@router.post(
    "/contexts",
    status_code=202,
    response_model=ContextObject,
    responses={201: {"model": ContextObject, "description": "With `wait`: it is encoded."}},
    openapi_extra=FORM,
)
async def create(body: ContextRequest, request: Request) -> Response:
    """Keep a context and encode it ahead."""
    service = service_of(request)
    context = _context(body, request)
    encoding = await start_encoding(service, context)
    record_of(request.scope).numbers = {"context_tokens": len(context.kept.tokens)}
    if body.wait:
        await _wait(encoding, request)
        if context.failure:
            raise context.failure
    report = ContextObject(**context.report(service.engine))
    return JSONResponse(report.model_dump(), 201 if body.wait else 202)


@router.get("/contexts")
async def list_contexts(request: Request) -> ContextList:
    """All contexts of the key that asks."""
    service = service_of(request)
    contexts = service.contexts.of(record_of(request.scope).tenant)
    return ContextList(data=[ContextObject(**context.report(service.engine)) for context in contexts])


@router.get(
    "/contexts/{context_id}",
    response_model=ContextObject,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def get_context(context_id: str, request: Request, stream: bool = False) -> Response:
    """A context; with `stream`, server-sent events with it until it is encoded."""
    service = service_of(request)
    context = service.contexts.get(context_id, record_of(request.scope).tenant)
    if stream:
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(_progress(service, context), 200, headers, "text/event-stream")
    return JSONResponse(ContextObject(**context.report(service.engine)).model_dump())


@router.delete("/contexts/{context_id}")
async def delete_context(context_id: str, request: Request) -> DeletedContext:
    """Forget a context; its KV is freed as soon as no request uses it."""
    contexts = service_of(request).contexts
    contexts.delete(contexts.get(context_id, record_of(request.scope).tenant))
    return DeletedContext(id=context_id)


def _context(body: ContextRequest, request: Request) -> Context:
    service = service_of(request)
    has_template = bool(service.tokenizer.chat_template)
    content = body.tokens if body.text is None else body.text
    return Context(
        tenant=record_of(request.scope).tenant,
        kept=KeptContext(content, body.opening(has_template=has_template)),
        star=body.star or StarOptions(),
        name=body.name or "",
        ttl_seconds=body.ttl_seconds or DAY,
        **body.owner(),
    )


async def _wait(encoding: asyncio.Task, request: Request) -> None:
    """Until it has ended; whoever goes away before does not end it."""
    gone = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({encoding, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not encoding.done():
            raise RequestError(499, "the client went away")
    finally:
        gone.cancel()


async def _progress(service: CompletionService, context: Context) -> AsyncIterator[str]:
    """The context whenever something has changed, and a comment while nothing has, until it is encoded."""
    last = None
    while True:
        try:
            service.contexts.get(context.id, context.tenant)
        except RequestError as error:
            yield _event(error_body(error.status, error.message, error.field))
            return
        report = ContextObject(**context.report(service.engine)).model_dump()
        yield _event(report) if report != last else ": nothing new\n\n"
        if report["status"] not in ("queued", "encoding"):
            yield "data: [DONE]\n\n"
            return
        last = report
        await asyncio.sleep(SECONDS_BETWEEN_EVENTS)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
