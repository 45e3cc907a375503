"""What happens to every HTTP request before a route sees it: a log line, admission, and a bounded body."""

import asyncio
import logging
from collections import Counter
from functools import partial
from time import monotonic, time_ns
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_star.server.connection import admitted
from megatron_star.server.errors import KINDS, error_response
from megatron_star.server.keys import KeyLimits
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.record import record_of
from megatron_star.server.request_id import HEADER, name_request
from megatron_star.server.settings import ServerSettings
from megatron_star.server.state import ServerState
from megatron_star.server.traced_request import TracedRequest
from megatron_star.server.traces import Traces

OPEN_PATHS = ("/", "/health", "/ping")
QUIET_METHODS = ("GET", "HEAD", "OPTIONS")
"""Of which no trace is kept."""
TRACE_HEADERS = ("traceparent", "tracestate")
KNOWN_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")
BODIES_IN_FLIGHT = 32
log = logging.getLogger("megatron_star.server")


class AccessLog:
    """One line and one count for each request, without a word of what was asked or answered."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, traces: Traces | None = None) -> None:
        self.app, self.metrics, self.traces = app, metrics, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, ended, record = monotonic(), 0, False, record_of(scope)
        name_request(scope)

        async def noted_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (HEADER, record.request_id.encode())]
                message["headers"] = headers
            else:
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, noted_send)
        except Exception:
            status = status or 500
            record.error = KINDS[500]
            raise
        finally:
            if not ended:
                record.error = record.error or KINDS[499]
            self._note(scope, status or 499, monotonic() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in KNOWN_METHODS else "other"
        record = record_of(scope)
        error = record.error or (KINDS.get(status, "refused") if status >= 400 else None)
        self.metrics.note_response(route=route, method=method, status=status, error=error)
        fields = {
            "request_id": record.request_id,
            "client": (scope.get("client") or ("?",))[0],
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            **({"key": record.tenant} if record.tenant else {}),
            **({"error": error} if error else {}),
            **record.numbers,
        }
        log.info("request", extra={"fields": fields})
        if self.traces and record.admitted and method not in QUIET_METHODS:
            self._trace(self.traces, scope, fields)

    def _trace(self, traces: Traces, scope: Scope, fields: dict[str, Any]) -> None:
        """Only of those who were let in: a stranger fills no queue."""
        record, now = record_of(scope), time_ns()
        sent = dict(scope["headers"])
        traces.note(
            TracedRequest(
                request_id=record.request_id,
                method=fields["method"],
                route=fields["route"],
                status=fields["status"],
                start_ns=now - int(fields["seconds"] * 1e9),
                end_ns=now,
                error=fields.get("error"),
                trace_headers={
                    name: sent[name.encode()].decode("latin-1")
                    for name in TRACE_HEADERS
                    if name.encode() in sent
                },
                answers=record.answers,
            )
        )


class LastAnswers:
    """Says `Connection: close` once the server is about to end, so that the next request goes elsewhere."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""

        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start" and self.state.leaving:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, closing_send)


class Admission:
    """Refuses whoever has no key, and everybody while the server is not ready; counts who is inside.

    A stranger's body is not read, and neither is that of a key with as many requests inside as it may have.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, state: ServerState) -> None:
        self.app, self.settings, self.state = app, settings, state
        self._inside = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        holder = self._holder(scope)
        if not holder:
            response = error_response(401, "give the API key as 'Authorization: Bearer KEY'", "Authorization")
            await response(scope, receive, send)
            return
        record_of(scope).tenant = name = holder.name
        if not self.state.ready:
            message = f"the server is {self.state.name}: try again later"
            await error_response(503, message)(scope, receive, send)
            return
        counts = scope["method"] not in QUIET_METHODS
        if counts and holder.max_requests is not None and self._inside[name] >= holder.max_requests:
            message = f"key {name!r} has {self._inside[name]} of {holder.max_requests} requests in flight"
            await error_response(429, f"{message} (max_requests): try again later")(scope, receive, send)
            return
        self.state.num_active += 1
        self._inside[name] += counts
        try:
            record_of(scope).admitted = True
            with admitted(scope):
                await self.app(scope, receive, send)
        finally:
            self.state.num_active -= 1
            self._inside[name] -= counts

    def _holder(self, scope: Scope) -> KeyLimits | None:
        if self.settings.keys is None:
            return KeyLimits()
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        holder = self.settings.keys.holder(key.strip())
        return holder if scheme.lower() == b"bearer" else None


class BodyLimit:
    """Takes in a whole body before the route runs: at most so many bytes, within so many seconds.

    Only of those who were let in: a body that comes to an open path is not read, and nothing is kept of it.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings
        self.bytes_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                refusal = await self._read(receive, body)
        except TimeoutError:
            refusal = 408, f"the body did not come within {self.settings.body_seconds:g} seconds"
        try:
            if refusal:
                await error_response(*refusal)(scope, receive, send)
            elif refusal is None:
                record_of(scope).body_taken = partial(self._give_back, body)
                await self.app(scope, _replayed(bytes(body), receive), send)
        finally:
            self._give_back(body)

    def _give_back(self, body: bytearray) -> None:
        """Its bytes are in flight no more: once they are checked, or when the request ends."""
        self.bytes_in_flight -= len(body)
        body.clear()

    async def _read(self, receive: Receive, body: bytearray) -> tuple[int, str] | tuple[()] | None:
        """Fill `body`; a status and a message if it is refused, () if the client went away."""
        limit = self.settings.max_request_bytes
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return ()
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > limit:
                return 413, f"the body has more than the {limit} bytes that are allowed"
            if self.bytes_in_flight + len(chunk) > BODIES_IN_FLIGHT * limit:
                return 503, "too many large requests at once: try again later"
            body += chunk
            self.bytes_in_flight += len(chunk)
            if not message.get("more_body"):
                return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one message, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
