"""A route whose body is checked away from the event loop before FastAPI sees it."""

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from megatron_star.server.errors import RequestError
from megatron_star.server.record import record_of
from megatron_star.server.state import server_of, service_of


class _CheckedRequest(Request):
    """A request whose body is checked already: FastAPI finds a model where it looks for JSON."""

    value: Any = None

    async def body(self) -> bytes:
        """Not empty, which is all that is asked."""
        return b"{}"

    async def json(self) -> Any:
        """The model."""
        return self.value


class CheckedBodyRoute(APIRoute):
    """Its body is checked by the server's `BodyChecker`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, behind the check."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        adapter = TypeAdapter(self.body_field.field_info.annotation)

        async def check_and_handle(request: Request) -> Response:
            if not _is_json(request.headers.get("content-type", "")):
                raise RequestError(400, "Content-Type: it must be application/json", "Content-Type")
            checked = _CheckedRequest(request.scope, request.receive)
            most_items = service_of(request).engine.max_sequence_length
            bodies = server_of(request).bodies
            checked.value = await bodies.check(await _whole(request), adapter, most_items)
            record_of(request.scope).body_taken()
            return await handle(checked)

        return check_and_handle


async def _whole(request: Request) -> bytes:
    """The body, which the request does not keep."""
    return b"".join([chunk async for chunk in request.stream()])


def _is_json(content_type: str) -> bool:
    """A page elsewhere cannot send that unless this server allows it, as with `--allowed-origins`."""
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
