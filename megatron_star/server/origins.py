"""Pages of others that may use the server from a browser: none, unless they are named."""

from typing import Any
from urllib.parse import urlsplit

ANY = "*"
SECONDS_TO_REMEMBER = 600


def check_origins(origins: tuple[str, ...], *, has_key: bool) -> None:
    """Raises ValueError, naming the one that is none as browsers send it, or that lets in too many."""
    for origin in origins:
        if origin == ANY:
            if not has_key:
                raise ValueError("allowed origin '*': without an API key, every page could use the server")
        elif not _is_origin(origin):
            raise ValueError(
                f"allowed origin {origin!r}: it must be as https://app.example or http://host:8080"
            )


def cors_options(origins: tuple[str, ...]) -> dict[str, Any]:
    """What starlette's CORSMiddleware is told. No cookies: who may ask is said by the key."""
    return {
        "allow_origins": origins,
        "allow_methods": ("GET", "PUT", "POST", "DELETE"),
        "allow_headers": (ANY,),
        "expose_headers": ("X-Request-Id", "Retry-After"),
        "max_age": SECONDS_TO_REMEMBER,
    }


def _is_origin(text: str) -> bool:
    """A scheme, a host in lower case and maybe a port, as browsers compare and send it."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if ":" in (host or ""):
        host = f"[{host}]"
    return bool(host) and text == f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
