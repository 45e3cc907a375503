"""Every error has one body: `error`, as OpenAI's clients read it, and `message`, as Megatron's does."""

import json
import logging
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from megatron_star.config import FieldError
from megatron_star.server.record import record_of

LONGEST_MESSAGE = 500
KINDS = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "slow_body",
    409: "conflict",
    413: "too_large",
    429: "busy",
    499: "client_gone",
    500: "internal_error",
    503: "unavailable",
}
RETRY_AFTER_SECONDS = {429: 1, 503: 10}
log = logging.getLogger("megatron_star.server")


class RequestError(Exception):
    """A request that is refused: a status, a sentence, and the field that is meant."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


class ErrorDetail(BaseModel):
    """What is wrong; `param` is the field that is meant."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error."""

    message: str
    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; `param` names the field."},
    503: {"model": ErrorBody, "description": "Loading, draining or stopped; see Retry-After."},
}


def refusal(error: ValueError) -> RequestError:
    """What a value that is wrong means over HTTP: status 400, and the field if the error has one."""
    return RequestError(400, str(error), error.field if isinstance(error, FieldError) else None)


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """The body of an error response, and of an error in a stream."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + " ..."
    return {
        "message": message,
        "error": {"message": message, "type": kind, "param": field, "code": KINDS.get(status, "refused")},
    }


def error_response(status: int, message: str, field: str | None = None) -> Response:
    """ASCII only: a message may quote half of a surrogate pair."""
    headers = {}
    if status in RETRY_AFTER_SECONDS:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS[status])
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = json.dumps(error_body(status, message, field))
    return Response(content, status, headers, "application/json")


def describe_validation(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """One sentence on the first thing that is wrong with a body, and the field's name."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    # What follows these names an alternative of a union, not a field.
    path = takewhile(
        lambda part: (
            not part.startswith("function-") and part != "str" and (part.isidentifier() or part.isdecimal())
        ),
        path,
    )
    field = ".".join(path)[:100] or None
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such field", field
    message = first["msg"].removeprefix("Value error, ")
    return (f"{field}: {message}" if field else message), field


def install_error_handlers(app: FastAPI) -> None:
    """Let every exception end in `error_response`."""

    async def refused(request: Request, error: RequestError) -> Response:
        record_of(request.scope).error = KINDS.get(error.status, "refused")
        return error_response(error.status, error.message, error.field)

    async def wrong_field(request: Request, error: FieldError) -> Response:
        return await refused(request, refusal(error))

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        record_of(request.scope).error = KINDS[400]
        return error_response(400, *describe_validation(error.errors()))

    async def http(request: Request, error: HTTPException) -> Response:
        record_of(request.scope).error = KINDS.get(error.status_code, "refused")
        return error_response(error.status_code, str(error.detail))

    async def bug(request: Request, error: Exception) -> Response:
        log.exception("a bug in the server", exc_info=error)
        return error_response(500, "internal error: see the server's log")

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(FieldError, wrong_field)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)
