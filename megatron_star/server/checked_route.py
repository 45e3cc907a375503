"""A route whose body is checked away from the event loop before FastAPI sees it."""

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.datastructures import Headers

from megatron_star.server.errors import RequestError
from megatron_star.server.form import is_form, parsed
from megatron_star.server.json_body import validated
from megatron_star.server.record import record_of
from megatron_star.server.state import server_of, service_of


class _CheckedRequest(Request):
    """A request whose body is checked already: FastAPI finds a model where it looks for JSON."""

    value: Any = None

    @property
    def headers(self) -> Headers:
        """Of a body that is JSON, as the model was at last."""
        return Headers({"content-type": "application/json"})

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
            checked = _CheckedRequest(request.scope, request.receive)
            checked.value = await self._value(request, adapter)
            record_of(request.scope).body_taken()
            return await handle(checked)

        return check_and_handle

    async def _value(self, request: Request, adapter: TypeAdapter) -> Any:
        """What the adapter makes of the body."""
        if not _is_json(request.headers.get("content-type", "")):
            raise RequestError(400, "Content-Type: it must be application/json", "Content-Type")
        most_items = service_of(request).engine.max_sequence_length
        return await server_of(request).bodies.check(await _whole(request), adapter, most_items)


class BodyOrFormRoute(CheckedBodyRoute):
    """Its body may be a form, too, whose `file` is a document: its text is the model's field `text`.

    The model says what a form's other fields are: see `ContextRequest.values_of_form`.
    """

    async def _value(self, request: Request, adapter: TypeAdapter) -> Any:
        content_type = request.headers.get("content-type", "")
        if not is_form(content_type):
            return await super()._value(request, adapter)
        server, body = server_of(request), await _whole(request)
        form = await server.bodies.run(parsed, body, content_type)
        values = self.body_field.field_info.annotation.values_of_form(form.fields)
        if form.file:
            if "text" in values:
                raise RequestError(400, "text: the form has a file in its place", "text")
            values = {"name": form.file.name, **values, "text": await server.documents.text(form.file)}
        return await server.bodies.run(validated, values, adapter)


def form_description(others: dict[str, Any] | bool) -> dict[str, Any]:
    """For /openapi.json: that a body may be a form.

    others: JSON schema of its fields besides `file` and `name`; False where there are none.
    """
    file = {"type": "string", "format": "binary", "description": "text, Markdown, HTML or PDF"}
    schema = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": file, "name": {"type": "string", "maxLength": 256}},
        "additionalProperties": others,
    }
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


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
