"""Where the server is in its life, how many requests are inside, and what all routes share."""

from dataclasses import dataclass, field
from time import time

from fastapi import FastAPI, Request

from megatron_star.server.documents import DocumentReader
from megatron_star.server.json_body import BodyChecker
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.service import CompletionService
from megatron_star.server.settings import ServerSettings


@dataclass
class ServerState:
    """Written by the main thread (service, leaving, draining) and by the HTTP thread (num_active).

    Attributes:
        leaving: the server ends soon, which /health says to proxies; requests are taken until it drains.
    """

    service: CompletionService | None = None
    leaving: bool = False
    draining: bool = False
    num_active: int = 0

    @property
    def ready(self) -> bool:
        """Requests are taken; with trouble they wait, as answers do."""
        return self.service is not None and not self.draining

    @property
    def trouble(self) -> str | None:
        """Why answers do not come at present, if they do not."""
        return self.service.engine.trouble() if self.service else None

    @property
    def name(self) -> str:
        """`loading`, `ready`, `draining` or `stalled`."""
        if self.service is None:
            return "loading"
        if self.leaving:
            return "draining"
        return "stalled" if self.trouble else "ready"


@dataclass(frozen=True)
class Server:
    """All that the routes share; `created` is when it was put together, in seconds since 1970."""

    settings: ServerSettings
    state: ServerState
    metrics: ServerMetrics
    bodies: BodyChecker = field(default_factory=BodyChecker)
    documents: DocumentReader = field(default_factory=DocumentReader)
    created: int = field(default_factory=lambda: int(time()))

    def attach(self, app: FastAPI) -> None:
        """Let `server_of` find it from requests to this application."""
        app.state.server = self


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    return request.app.state.server


def service_of(request: Request) -> CompletionService:
    """The service; admission lets nobody in before there is one."""
    service = server_of(request).state.service
    assert service is not None
    return service
