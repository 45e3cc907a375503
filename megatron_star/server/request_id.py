"""The name of one HTTP request: the client's, if it gave one that can be shown anywhere, else a new one."""

import re
import secrets

from starlette.types import Scope

from megatron_star.server.record import record_of

HEADER = b"x-request-id"
LONGEST_REQUEST_ID = 128
SAFE_REQUEST_ID = rf"^[A-Za-z0-9._:/+=@-]{{1,{LONGEST_REQUEST_ID}}}$"
"""What needs no escape in a header, a line of a log or an address."""
_SAFE = re.compile(SAFE_REQUEST_ID.removesuffix("$") + r"\Z")


def name_request(scope: Scope) -> None:
    """By its first `X-Request-Id`, else by 32 hexadecimal digits."""
    record_of(scope).request_id = _from_header(scope) or secrets.token_hex(16)


def named_request(scope: Scope, in_body: str | None) -> str:
    """Its name from here on: what the body says, which is a safe one, unless a header has said it."""
    record = record_of(scope)
    if in_body and not _from_header(scope):
        record.request_id = in_body
    return record.request_id


def _from_header(scope: Scope) -> str | None:
    given = next((value for name, value in scope.get("headers", ()) if name == HEADER), b"").decode("latin-1")
    return given if _SAFE.match(given) else None
