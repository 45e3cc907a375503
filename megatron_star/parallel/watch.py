"""Notice at once when a rank of the job is gone, whatever the others are waiting for.

Every worker keeps a TCP connection to the driver, which nothing else uses. A process that ends, however it
ends, closes it; a machine that goes away fails its keepalive. The driver then says which rank it was, and all
end. Collectives alone would not do: NCCL waits for a dead peer until its watchdog's timeout, minutes later.
"""

import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from megatron_star.parallel.control import broadcast_json

KEEPALIVE_SECONDS = 2
KEEPALIVE_TRIES = 3
GOODBYE, REPORTED = b"goodbye\n", b"a rank is lost, and that is reported\n"
TOKEN_BYTES = 32
FAILURE_STATUS = 1


def _end_process(message: str) -> None:
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(FAILURE_STATUS)


class RankWatch:
    """Ends this process, with a line that names the rank, when another rank of the job has ended unasked."""

    def __init__(
        self, control: dist.ProcessGroup, address: str, on_loss: Callable[[str], None] = _end_process
    ) -> None:
        """Connect all ranks; every rank calls this at the same time.

        Args:
            address: host name or address of the driver's machine, on which it listens and the workers call.
            on_loss: what to do with the message, which is empty where the driver reports the loss.
        """
        self._on_loss = on_loss
        self._closing = False
        self._connections: dict[socket.socket, int] = {}
        if dist.get_rank() == 0:
            self._accept_workers(control, address)
        else:
            self._call_driver(control)
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The job ends as planned: from here on, ranks may go."""
        self._closing = True
        for connection in self._connections:
            with suppress(OSError):
                connection.sendall(GOODBYE)

    def _accept_workers(self, control: dist.ProcessGroup, address: str) -> None:
        token = secrets.token_hex(TOKEN_BYTES)
        family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((address, 0), family=family, backlog=control.size()) as server:
            broadcast_json([address, server.getsockname()[1], token], control)
            while len(self._connections) < control.size() - 1:
                connection, _ = server.accept()
                rank = _greeted_rank(connection, token)
                if rank is None:
                    connection.close()
                    continue
                self._connections[_kept_alive(connection)] = rank

    def _call_driver(self, control: dist.ProcessGroup) -> None:
        address, port, token = broadcast_json(None, control)
        connection = socket.create_connection((address, port), timeout=30)
        connection.sendall(f"{token} {dist.get_rank():08d}\n".encode())
        self._connections[_kept_alive(connection)] = 0

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    self._read(selector, key.fileobj)

    def _read(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        rank = self._connections[connection]
        if data == GOODBYE or (not data and self._closing):
            selector.unregister(connection)
            return
        self._on_loss("" if data == REPORTED else self._report(rank))

    def _report(self, rank: int) -> str:
        for connection in self._connections:
            with suppress(OSError):
                connection.sendall(REPORTED)
        return f"rank {rank}{' (the driver)' if rank == 0 else ''} has ended; all ranks stop"


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_TRIES)
    return connection


def _greeted_rank(connection: socket.socket, token: str) -> int | None:
    """The rank of a caller who knows the token, which only ranks do; None for anybody else."""
    connection.settimeout(5)
    length, greeting = len(token) + len(" 00000000\n"), b""
    with suppress(OSError):
        while len(greeting) < length and (data := connection.recv(length - len(greeting))):
            greeting += data
    given, _, rank = greeting.decode(errors="replace").strip().partition(" ")
    if not hmac.compare_digest(given, token) or not rank.isdecimal():
        return None
    return int(rank)
