"""For whoever runs the server, and for a person who just wants to try it: health, metrics, the page."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import megatron_star
from megatron_star.server.page import HEADERS, PAGE
from megatron_star.server.state import server_of

router = APIRouter(tags=["operations"])


NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"description": "Loading, draining, or a rank does not go on."}
}


@router.get("/health", responses=NOT_READY)
@router.get("/ping", responses=NOT_READY)
@router.post("/ping", responses=NOT_READY)
async def health(request: Request) -> JSONResponse:
    """200 while requests are taken and answered, 503 while they are not; needs no key.

    SageMaker asks for it as /ping.
    """
    state = server_of(request).state
    trouble = state.trouble
    ready = state.ready and not state.leaving and not trouble
    body = {"status": state.name, "live": True, "ready": ready, "draining": state.leaving}
    if trouble:
        body["trouble"] = trouble
    return JSONResponse(body, 200 if ready else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """Which megatron-star this is."""
    return {"version": megatron_star.__version__}


@router.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Prometheus' exposition format."""
    return Response(server_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """One page to ask questions about documents."""
    return HTMLResponse(PAGE, headers=HEADERS)
