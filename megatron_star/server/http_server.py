"""uvicorn in a thread of the driver, from before the model is loaded until everything is drained."""

import os
import socket
import threading
from collections.abc import Callable
from time import monotonic, sleep

import uvicorn
from fastapi import FastAPI

from megatron_star.server.connection import Connections, protocol
from megatron_star.server.service import CompletionService
from megatron_star.server.settings import ServerSettings
from megatron_star.server.state import ServerState

BACKLOG = 1024
SECONDS_FOR_LAST_WORDS = 3.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError, naming the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # Connections inherit it. Without it a token waits up to 40 ms until the one before is acknowledged.
        # asyncio sets it only where a socket says which protocol it speaks, which `create_server`'s do not.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        known = isinstance(error, OSError) and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno) if known else str(error)
        raise ValueError(f"cannot listen on {host} port {port}: {reason}") from error


class HttpServer:
    """The application on a socket, in a thread."""

    def __init__(
        self,
        app: FastAPI,
        settings: ServerSettings,
        state: ServerState,
        listener: socket.socket,
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Serve from now on; `on_failure` is called in the thread if that ends unasked."""
        self.state, self._on_failure, self._listener = state, on_failure, listener
        config = uvicorn.Config(
            app,
            http=protocol(settings.body_seconds, Connections(settings.max_connections)),
            timeout_keep_alive=settings.keep_alive_seconds,
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

    def drain(self, seconds: float, hurry: Callable[[], bool], *, notice_seconds: float = 0.0) -> None:
        """Refuse new requests, wait for those inside, for so long or until `hurry`, then cancel and close.

        Args:
            notice_seconds: before that, requests are taken while /health says no more: until proxies know.
        """
        self.state.leaving = True
        _wait(notice_seconds, hurry)
        self.state.draining = True
        self._wait_until_empty(seconds, hurry)
        if self.state.service:
            self.state.service.cancel_all()
        self._wait_until_empty(SECONDS_FOR_LAST_WORDS, lambda: False)
        self._server.should_exit = True
        self._thread.join(SECONDS_FOR_LAST_WORDS)

    def _wait_until_empty(self, seconds: float, over: Callable[[], bool]) -> None:
        _wait(seconds, lambda: not self.state.num_active or over())

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
            if not self._server.should_exit:
                raise RuntimeError("the HTTP server ended unasked")
        except Exception as error:
            self._on_failure(error)


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    """For so long, or until it is over."""
    deadline = monotonic() + seconds
    while monotonic() < deadline and not over():
        sleep(0.05)
