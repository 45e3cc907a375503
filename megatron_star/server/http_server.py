"""uvicorn in a thread of the driver, from before the model is loaded until everything is drained."""

import asyncio
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from time import monotonic, sleep

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_star.server.completion import CompletionService
from megatron_star.server.state import ServerState

BACKLOG = 1024
SECONDS_FOR_LAST_WORDS = 3.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError, naming the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        known = isinstance(error, OSError) and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno) if known else str(error)
        raise ValueError(f"cannot listen on {host} port {port}: {reason}") from error


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level and message, then the fields that came with it."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Let the server's and uvicorn's loggers write JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (
        ("megatron_star.server", logging.INFO),
        ("megatron_star.inference", logging.INFO),
        ("uvicorn", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class PatientProtocol(H11Protocol):
    """HTTP on one connection, which is closed if the head of a request is not there in time.

    uvicorn itself limits only how long a connection says nothing after a request.
    """

    def __init__(self, *, head_seconds: float, **options) -> None:
        super().__init__(**options)
        self._head_seconds = head_seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first head is awaited from now on."""
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        """The next head is awaited from now on."""
        self._await_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._head_seconds, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class HttpServer:
    """The application on a socket, in a thread."""

    def __init__(
        self,
        app: FastAPI,
        state: ServerState,
        listener: socket.socket,
        on_failure: Callable[[Exception], None],
        *,
        head_seconds: float,
    ) -> None:
        """Serve from now on; `on_failure` is called in the thread if that ends unasked."""
        self.state, self._on_failure, self._listener = state, on_failure, listener
        config = uvicorn.Config(
            app,
            http=partial(PatientProtocol, head_seconds=head_seconds),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def open(self, service: CompletionService) -> None:
        """Take requests."""
        self.state.service = service

    def drain(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Refuse new requests, wait for those inside, for so long or until `hurry`, then cancel and close."""
        self.state.draining = True
        self._wait_until_empty(seconds, hurry)
        if self.state.service:
            self.state.service.cancel_all()
        self._wait_until_empty(SECONDS_FOR_LAST_WORDS, lambda: False)
        self._server.should_exit = True
        self._thread.join(SECONDS_FOR_LAST_WORDS)

    def _wait_until_empty(self, seconds: float, hurry: Callable[[], bool]) -> None:
        deadline = monotonic() + seconds
        while self.state.num_active and monotonic() < deadline and not hurry():
            sleep(0.05)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
            if not self._server.should_exit:
                raise RuntimeError("the HTTP server ended unasked")
        except Exception as error:
            self._on_failure(error)
