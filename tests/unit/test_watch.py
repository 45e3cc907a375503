"""The connections by which ranks notice that one is lost or stopped: threads here, or bare sockets."""

import json
import socket
import threading
from datetime import timedelta
from time import monotonic, sleep

import pytest
import torch.distributed as dist

from megatron_star.parallel import watch as watch_module
from megatron_star.parallel.watch import STORE_KEY, RankWatch

NOBODY_MINDS = {"on_loss": lambda message: None}


class Driver:
    """A watch of rank 0, made in a thread, and what it says of losses."""

    def __init__(self, world_size: int, address: str = "127.0.0.1", silence: float = 600.0) -> None:
        self.store, self.losses, self.error = dist.HashStore(), [], None
        arguments = (self.store, 0, world_size, address)
        options = {"longest_silence": timedelta(seconds=silence), "on_loss": self.losses.append}
        self.thread = threading.Thread(target=self._make, args=(arguments, options))
        self.thread.start()
        self.port, self.token = json.loads(self.store.get(STORE_KEY))

    def _make(self, arguments: tuple, options: dict) -> None:
        try:
            self.watch = RankWatch(*arguments, **options)
        except OSError as error:
            self.error = error

    def called_by(self, said: bytes) -> socket.socket:
        """A bare connection that has said so much."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(said)
        return connection

    def call(self, rank: int) -> socket.socket:
        """A bare connection of a rank, which then sends nothing."""
        return self.called_by(f"{self.token} {rank:08d}\n".encode())


def wait_until(condition) -> None:
    end = monotonic() + 20
    while not condition():
        assert monotonic() < end
        sleep(0.01)


def test_a_rank_that_ends_is_named_and_one_that_says_goodbye_is_not():
    driver = Driver(3)
    first, second = driver.call(1), driver.call(2)
    driver.thread.join(20)
    first.sendall(b".g")
    first.close()
    second.close()
    wait_until(lambda: driver.losses)
    assert driver.losses[0] == "rank 2 has ended; all ranks stop"
    assert not any("rank 1" in loss for loss in driver.losses)


def test_a_rank_that_sends_no_beat_is_silent_and_in_the_end_lost():
    driver = Driver(3, silence=1.5)
    stopped = driver.call(1)
    alive = RankWatch(driver.store, 2, 3, "127.0.0.1", **NOBODY_MINDS)
    driver.thread.join(20)
    wait_until(lambda: driver.losses)
    assert set(driver.losses) == {"rank 1 has been silent for 2 s; all ranks stop"}
    assert driver.watch.silent_ranks(1.4) == [1]
    alive.close()
    stopped.close()


def test_strangers_who_say_nothing_or_something_else_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(watch_module, "MOST_STRANGERS", 4)
    driver = Driver(2)
    strangers = [driver.called_by(said) for said in [b"", b"GET / HTTP/1.1\r\n", b"x" * 100] * 5]
    rank = RankWatch(driver.store, 1, 2, "127.0.0.1", **NOBODY_MINDS)
    driver.thread.join(20)
    assert not driver.thread.is_alive() and driver.error is None
    for watch in (driver.watch, rank):
        watch.close()
    for stranger in strangers:
        stranger.close()


def test_ranks_that_do_not_call_are_named_within_the_bound(monkeypatch):
    monkeypatch.setattr(watch_module, "SECONDS_TO_CALL", 0.3)
    driver = Driver(4)
    called = driver.call(2)
    driver.thread.join(20)
    assert "rank 1, 3 did not reach rank 0 at 127.0.0.1 port" in str(driver.error)
    called.close()


def test_a_host_name_that_means_another_address_here_is_listened_for_on_all_addresses(monkeypatch):
    # As Debian's /etc/hosts has it; the workers elsewhere get the right address.
    monkeypatch.setattr(socket, "getaddrinfo", _debian(socket.getaddrinfo))
    driver = Driver(2, address="this-host.example")
    connection = driver.call(1)  # by another address than 127.0.1.1
    driver.thread.join(20)
    assert driver.error is None
    driver.watch.close()
    connection.close()


def _debian(original):
    def look_up(host, *args, **options):
        return original("127.0.1.1" if host == "this-host.example" else host, *args, **options)

    return look_up


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_job_of_one_machine_is_not_listened_for_from_elsewhere(address):
    with watch_module._listener(address, 2) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
