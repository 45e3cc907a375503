"""By which names this machine may be called where no key is asked for.

A page of a stranger in a browser can ask whatever that browser reaches: as itself, which `Origin` says; or,
once its own name is made to mean this machine (DNS rebinding), as one of ours, which `Host` says. Without a
key, therefore, only names count that nobody else can own.
"""

import socket
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_star.server.errors import error_response
from megatron_star.server.settings import ServerSettings

LOOPBACK_NAME = "localhost"


class OwnNames:
    """Names of the loopback; where others are let in too, also this machine's own, and every IP address."""

    def __init__(self, host: str, allowed_origins: Iterable[str] = ()) -> None:
        """
        Args:
            host: where the server listens.
            allowed_origins: whose pages may ask it, besides its own.
        """
        self._allowed_origins = frozenset(allowed_origins)
        self._loopback_only = _is_loopback(host)
        self._names = {LOOPBACK_NAME}
        if not self._loopback_only:
            own = socket.gethostname()
            self._names |= {name.lower() for name in (host, own, own.split(".")[0])}
            # It may ask name servers, and wait long for one that does not answer.
            threading.Thread(target=self._add_full_name, daemon=True).start()

    def _add_full_name(self) -> None:
        self._names.add(socket.getfqdn().lower())

    def refused(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, str] | None:
        """The first header of a request that names something else, and what it says."""
        for name, value in headers:
            text = value.decode("latin-1")
            if name == b"host" and not self._is_own(f"//{text}"):
                return "Host", text
            if name == b"origin" and text not in self._allowed_origins and not self._is_own(text):
                return "Origin", text
        return None

    def _is_own(self, url: str) -> bool:
        try:
            name = (urlsplit(url).hostname or "").removesuffix(".")
        except ValueError:
            return False
        if name in self._names:
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or not self._loopback_only)


class OwnNamesOnly:
    """Refuses requests to names of others, and from their pages, where no key is asked for."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.names = OwnNames(settings.host, settings.allowed_origins) if settings.keys is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        refused = self.names.refused(scope["headers"]) if self.names and scope["type"] == "http" else None
        if refused is None:
            await self.app(scope, receive, send)
            return
        header, value = refused
        message = (
            f"{header}: {value[:100]!r} is no name of this server; with --api-key-file, any name will do"
        )
        await error_response(403, message, header)(scope, receive, send)


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == LOOPBACK_NAME or (address is not None and address.is_loopback)
