"""One HTTP connection, and how many there may be: what strangers can take up is bounded, in every way.

uvicorn itself limits only how long a connection says nothing after a request.
"""

import asyncio
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_star.server.errors import KINDS
from megatron_star.server.record import record_of

LARGEST_HEAD_BYTES = 16 << 10
PIECE_BYTES = 16 << 10
"""Of what has come in, taken apart at once: the limit on a head is looked at in between."""
MOST_SMALL_CHUNKS, SMALL_CHUNK_BYTES = 4096, 64
"""A body in more chunks than that, with fewer bytes each on average, is refused: each chunk takes time."""
LINGER_SECONDS = 5.0
"""After an answer that did not wait for its request's body, for the client to come to read it."""
SHARE_OF_FILES = 0.5
"""Of the files that the process may open, for connections."""


class _CountedChunks(h11.Connection):
    """Refuses bodies in very many very small chunks."""

    num_chunks = num_bytes = 0

    def next_event(self) -> Any:
        """As h11's; raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks = self.num_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_chunks += 1
            self.num_bytes += len(event.data)
            is_small = self.num_bytes < SMALL_CHUNK_BYTES * self.num_chunks
            if is_small and self.num_chunks > MOST_SMALL_CHUNKS:
                raise h11.RemoteProtocolError("the body comes in too many small chunks")
        return event


class Connections:
    """The open connections. Where there is no room for one more, one that nobody was let in on has to go."""

    def __init__(self, most: int) -> None:
        """most: connections at the same time; fewer where the process may not open so many files."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = most if files == resource.RLIM_INFINITY else min(most, int(SHARE_OF_FILES * files))
        self._open: dict[PatientProtocol, None] = {}

    def add(self, connection: "PatientProtocol") -> bool:
        """A new one; False if there is no room, since all others are in use by whom they were opened by."""
        if len(self._open) >= self.most:
            idle = [other for other in self._open if not other.num_admitted]
            if not idle:
                return False
            first = min(idle, key=lambda other: other.was_admitted)  # of equals, who was idle longest
            self.discard(first)
            first.transport.abort()
        self._open[connection] = None
        return True

    def note_idle(self, connection: "PatientProtocol") -> None:
        """It has answered, and is the last to go for that."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def discard(self, connection: "PatientProtocol") -> None:
        """It is closed."""
        self._open.pop(connection, None)


@contextmanager
def admitted(scope: Scope) -> Iterator[None]:
    """While whoever asks is known: the connection is not closed for another one."""
    connection = scope.get("state", {}).get("connection")
    if connection is None:  # not behind `PatientProtocol`
        yield
        return
    connection.was_admitted = True
    connection.num_admitted += 1
    try:
        yield
    finally:
        connection.num_admitted -= 1


class PatientProtocol(H11Protocol):
    """HTTP on one connection.

    It is closed if the head of a request is not there in time, or if nobody reads an answer for as long. So
    it is some seconds after an answer that did not wait for the whole request; what comes in meanwhile is
    thrown away.

    Attributes:
        num_admitted: requests in it, at this moment, of somebody who was let in; was_admitted: ever.
    """

    def __init__(
        self, *, connections: Connections, head_seconds: float, app_state: dict[str, Any], **options: Any
    ) -> None:
        super().__init__(app_state=app_state | {"connection": self}, **options)
        self.conn = _CountedChunks(h11.SERVER, LARGEST_HEAD_BYTES)
        self.num_admitted, self.was_admitted = 0, False
        self._registry, self._head_seconds = connections, head_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._lingers = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first head is awaited from now on."""
        super().connection_made(transport)
        if self._registry.add(self):
            self._close_in(self._head_seconds)
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Piece by piece. From a request's first byte on, the rest of its head is awaited."""
        for start in range(0, len(data), PIECE_BYTES):
            if self._lingers or self.transport.is_closing():
                return
            super().data_received(data[start : start + PIECE_BYTES])
        if self._is_between_requests and self._timer is None:
            self._close_in(self._head_seconds)

    def on_response_complete(self) -> None:
        """The next request may take `timeout_keep_alive` seconds to begin."""
        self._stop_timer()
        self._registry.note_idle(self)
        if self.conn.their_state is h11.SEND_BODY:
            self._linger()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; if an answer was given already, only close. Whoever reads it is told."""
        if not self._is_between_requests:
            record_of(self.cycle.scope).error = KINDS[400]
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Whoever asked does not read: what was written waits in memory, and so does who writes."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self._head_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """They read again."""
        super().resume_writing()
        self._stop_unread_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._stop_timer()
        self._stop_unread_timer()
        self._registry.discard(self)
        super().connection_lost(exc)

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _linger(self) -> None:
        self._lingers = True
        if not self.transport.is_closing():
            with suppress(OSError):  # the other side may be gone
                self.transport.write_eof()
        self._close_in(LINGER_SECONDS)

    def _close_in(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._close_without_request)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer:
            self._unread_timer.cancel()
        self._unread_timer = None

    def _close_without_request(self) -> None:
        self._timer = None
        if self._is_between_requests:
            self.transport.abort()


def protocol(head_seconds: float, connections: Connections) -> Callable[..., PatientProtocol]:
    """What uvicorn calls for each connection."""

    def connect(**options: Any) -> PatientProtocol:
        return PatientProtocol(connections=connections, head_seconds=head_seconds, **options)

    return connect
