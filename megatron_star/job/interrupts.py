"""Ctrl-C while the main thread waits in a collective, where Python does not get to see it."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

SECONDS_FOR_PYTHON = 3.0
FAILURE_STATUS = 1


@contextmanager
def heeded_interrupts() -> Iterator[None]:
    """For the time of a `with` block of the main thread, SIGINT ends this process even so.

    Python raises KeyboardInterrupt once the main thread is back from what it waits for, which may be never.
    A thread is told of the signal at once, and ends the process if it is still there after
    `SECONDS_FOR_PYTHON`. Programs with a handler of their own are left alone.
    """
    told, tell = socket.socketpair()
    tell.setblocking(False)
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(told,), name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        tell.close()


def _listen(told: socket.socket) -> None:
    with told:
        while numbers := told.recv(64):
            if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                sleep(SECONDS_FOR_PYTHON)
                print("error: interrupted while waiting for other ranks", file=sys.stderr, flush=True)
                os._exit(FAILURE_STATUS)
