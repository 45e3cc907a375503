"""The name of one HTTP request: the client's, if it gave one that can be shown anywhere, else a new one."""

import re
import secrets
from collections.abc import Iterable

HEADER = b"x-request-id"
LONGEST_REQUEST_ID = 128
SAFE_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{LONGEST_REQUEST_ID}}}")
"""What needs no escape in a header, a line of a log, a shell or an address."""


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """What the first `X-Request-Id` says, or a new one: 32 hexadecimal digits."""
    given = next((value for name, value in headers if name == HEADER), b"").decode("latin-1")
    return given if SAFE_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
