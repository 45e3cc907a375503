"""The FastAPI application: routes, middleware and error bodies put together."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import megatron_star
from megatron_star.server import operations_routes
from megatron_star.server.errors import install_error_handlers
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.middleware import AccessLog, Admission, BodyLimit, LastAnswers
from megatron_star.server.names import OwnNamesOnly
from megatron_star.server.origins import cors_options
from megatron_star.server.settings import ServerSettings
from megatron_star.server.state import Server, ServerState
from megatron_star.server.traces import Traces
from megatron_star.server.wires import (
    chat_route,
    completion_route,
    contexts_routes,
    documents_route,
    megatron_routes,
    openai_routes,
    responses_route,
    tokenize_route,
)


def create_app(
    settings: ServerSettings, state: ServerState, metrics: ServerMetrics, traces: Traces | None = None
) -> FastAPI:
    """The application; it answers once `state` has a service."""
    # FastAPI's own pages of documentation load scripts from elsewhere; the description itself stays.
    # It redirects nobody either: where to would be up to the request's Host.
    app = FastAPI(
        title="megatron-star",
        version=megatron_star.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
    )
    Server(settings, state, metrics).attach(app)
    for routes in (
        megatron_routes,
        openai_routes,
        completion_route,
        chat_route,
        contexts_routes,
        documents_route,
        responses_route,
        tokenize_route,
        operations_routes,
    ):
        app.include_router(routes.router)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Admission, settings=settings, state=state)
    app.add_middleware(OwnNamesOnly, settings=settings)
    if settings.allowed_origins:
        # Outside of admission: a browser asks without a key first, and shows a page what it is refused for.
        app.add_middleware(CORSMiddleware, **cors_options(settings.allowed_origins))
    app.add_middleware(LastAnswers, state=state)
    app.add_middleware(AccessLog, metrics=metrics, traces=traces)
    return app
