"""Notice at once when a rank of the job is gone, and soon when one is stopped, whatever the others wait for.

Every worker keeps a TCP connection to the driver, which nothing else uses. A process that ends, however it
ends, closes it; a machine that goes away acknowledges nothing any more. The driver then says which rank it
was, and all end. Collectives alone would not do: NCCL waits for a dead peer until its watchdog's timeout,
minutes later. Both ends of a connection send a beat every second, from a thread of their own. A process that
is stopped (SIGSTOP, a debugger, a machine without memory) sends none.
"""

import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic

import torch.distributed as dist

from megatron_star.parallel.control import DRIVER

KEEPALIVE_SECONDS = 2
KEEPALIVE_TRIES = 3
BEAT, GOODBYE, REPORTED = b".", b"g", b"r"
BEAT_SECONDS = 1.0
SECONDS_TO_CALL = 30.0
"""For all workers to connect: they are there already, since they have met at the store."""
MOST_STRANGERS = 64
TOKEN_BYTES = 32
FAILURE_STATUS = 1
STORE_KEY = "rank watch"


def _end_process(message: str) -> None:
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(FAILURE_STATUS)


class RankWatch:
    """Ends this process, with a line that names the rank, when another rank of the job has ended unasked."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        address: str,
        *,
        longest_silence: timedelta = timedelta(minutes=10),
        on_loss: Callable[[str], None] = _end_process,
    ) -> None:
        """Connect all ranks; every rank calls this at the same time.

        Args:
            store: that all ranks have reached.
            address: host name or address under which the workers reach the driver's machine.
            longest_silence: of a rank, until it counts as lost.
            on_loss: what to do with the message, which is empty where the driver reports the loss.

        Raises:
            ConnectionError: a worker does not reach the driver; named, in the driver.
        """
        self._on_loss, self._rank, self._longest_silence = on_loss, rank, longest_silence.total_seconds()
        self._closing = False
        if rank == DRIVER:
            self._connections = _accept_workers(store, world_size, address)
        else:
            self._connections = {_call_driver(store, rank, address): DRIVER}
        self._heard_at = dict.fromkeys(self._connections.values(), monotonic())
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The job ends as planned: from here on, ranks may go."""
        self._closing = True
        for connection in self._connections:
            with suppress(OSError):
                connection.sendall(GOODBYE)

    def silent_ranks(self, seconds: float) -> list[int]:
        """Ranks that have not been heard of for so long; on a worker, only the driver is listened to."""
        now = monotonic()
        return [rank for rank, heard_at in sorted(self._heard_at.items()) if now - heard_at > seconds]

    def _watch(self) -> None:
        next_beat = monotonic()
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, next_beat - monotonic())):
                    self._read(selector, key.fileobj)
                if monotonic() >= next_beat:
                    next_beat = monotonic() + BEAT_SECONDS
                    self._beat()

    def _beat(self) -> None:
        for connection in self._connections:
            with suppress(OSError):  # a full buffer of a stopped rank, or a lost rank, which is read of
                connection.send(BEAT, socket.MSG_DONTWAIT)
        # Of a process that was stopped itself, everything that had come meanwhile has been read by now.
        silent = self.silent_ranks(self._longest_silence)
        if silent and not self._closing:
            self._on_loss(self._report(silent[0], f"has been silent for {self._longest_silence:.0f} s"))

    def _read(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        rank = self._connections[connection]
        self._heard_at[rank] = monotonic()
        if REPORTED in data:
            self._on_loss("")
        elif GOODBYE in data or (not data and self._closing):
            selector.unregister(connection)
        elif not data:
            self._on_loss(self._report(rank, "has ended"))

    def _report(self, rank: int, what: str) -> str:
        for connection in self._connections:
            with suppress(OSError):
                connection.send(REPORTED, socket.MSG_DONTWAIT)
        return f"rank {rank}{' (the driver)' if rank == DRIVER else ''} {what}; all ranks stop"


def _accept_workers(store: dist.Store, world_size: int, address: str) -> dict[socket.socket, int]:
    """The workers' connections: of those callers who know the token, which only ranks do."""
    if world_size == 1:
        return {}
    token = secrets.token_hex(TOKEN_BYTES)
    accepted: dict[socket.socket, int] = {}
    strangers: dict[socket.socket, bytes] = {}
    end = monotonic() + SECONDS_TO_CALL
    with _listener(address, world_size) as server, selectors.DefaultSelector() as selector:
        server.setblocking(False)
        store.set(STORE_KEY, json.dumps([server.getsockname()[1], token]))
        selector.register(server, selectors.EVENT_READ)
        while len(accepted) < world_size - 1:
            ready = selector.select(max(0.0, end - monotonic()))
            if monotonic() > end:
                missing = sorted(set(range(1, world_size)) - set(accepted.values()))
                raise ConnectionError(
                    f"rank {', '.join(map(str, missing))} did not reach rank 0 at {address} port "
                    f"{server.getsockname()[1]} within {SECONDS_TO_CALL:.0f} s: is a firewall between them?"
                )
            for key, _ in ready:
                if key.fileobj is server:
                    _let_in(server, selector, strangers, world_size + MOST_STRANGERS)
                elif key.fileobj in strangers:
                    rank = _rank_after_reading(key.fileobj, strangers, token)
                    if key.fileobj not in strangers:
                        selector.unregister(key.fileobj)
                    if rank is not None:
                        accepted[_kept_alive(key.fileobj)] = rank
        for connection in strangers:
            connection.close()
    return accepted


def _listener(address: str, world_size: int) -> socket.socket:
    """On this machine alone where the address says so; else on all addresses.

    A host's name may stand for another address here than elsewhere: Debian writes 127.0.1.1 in /etc/hosts.
    """
    with suppress(ValueError):
        literal = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
        if literal.is_loopback:
            family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
            return socket.create_server((str(literal), 0), family=family, backlog=world_size)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=world_size, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=world_size)


def _let_in(
    server: socket.socket,
    selector: selectors.BaseSelector,
    strangers: dict[socket.socket, bytes],
    most: int,
) -> None:
    """A caller, who has to say the token first; of too many, the one who has been silent for longest goes."""
    with suppress(OSError):
        connection, _ = server.accept()
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        strangers[connection] = b""
    if len(strangers) > most:
        oldest = next(iter(strangers))
        del strangers[oldest]
        selector.unregister(oldest)
        oldest.close()


def _rank_after_reading(
    connection: socket.socket, strangers: dict[socket.socket, bytes], token: str
) -> int | None:
    """The rank of a caller who has now said the token and it; one who never will is no stranger any more."""
    length, data = len(_greeting(token, 0)), b""
    with suppress(OSError):
        data = connection.recv(length - len(strangers[connection]))
    greeting = strangers[connection] + data
    if data and len(greeting) < length:
        strangers[connection] = greeting
        return None
    del strangers[connection]
    given, _, rank = greeting.decode(errors="replace").strip().partition(" ")
    if hmac.compare_digest(given.encode(), token.encode()) and rank.isdecimal():
        return int(rank)
    connection.close()
    return None


def _call_driver(store: dist.Store, rank: int, address: str) -> socket.socket:
    port, token = json.loads(store.get(STORE_KEY))
    try:
        connection = socket.create_connection((address, port), timeout=SECONDS_TO_CALL)
        connection.sendall(_greeting(token, rank))
    except OSError as error:
        message = f"rank {rank} cannot reach rank 0 at {address} port {port}: {error}"
        raise ConnectionError(message) from error
    return _kept_alive(connection)


def _greeting(token: str, rank: int) -> bytes:
    return f"{token} {rank:08d}\n".encode()


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_TRIES)
    # Beats are on their way to a machine that is gone, and as long as they are, nothing is kept alive.
    lost_after = KEEPALIVE_SECONDS * (KEEPALIVE_TRIES + 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * lost_after)
    return connection
