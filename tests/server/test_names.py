"""Without a key, only names count that nobody else can own."""

import socket

import pytest

from megatron_star.server.names import OwnNames

LOOPBACK = [
    "localhost",
    "localhost:5000",
    "LOCALHOST:1",
    "localhost.:5000",
    "127.0.0.1",
    "127.1.2.3:80",
    "[::1]:5000",
]
ELSEWHERE = [
    "evil.example",
    "localhost.evil.example:5000",
    "evil.example:5000",
    "",
    "a b",
    "[::1",
    "127.0.0.1.evil.example",
]
ADDRESSES = ["10.0.0.7:5000", "[fe80::1]:5000", "0.0.0.0:5000"]


def refused(listens_on: str, **headers: str):
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return OwnNames(listens_on).refused(pairs)


@pytest.mark.parametrize("name", LOOPBACK)
def test_names_of_the_loopback_are_let_in(name):
    for listens_on in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
        assert refused(listens_on, host=name) is None
        assert refused(listens_on, host=name, origin=f"http://{name}") is None


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_others_are_refused_wherever_the_server_listens(name):
    for listens_on in ("127.0.0.1", "0.0.0.0"):
        assert refused(listens_on, host=name) == ("Host", name)
        assert refused(listens_on, host="localhost", origin=f"https://{name}")[0] == "Origin"


@pytest.mark.parametrize("name", ADDRESSES)
def test_an_address_is_let_in_where_other_machines_are(name):
    assert refused("127.0.0.1", host=name) == ("Host", name)
    assert refused("0.0.0.0", host=name) is None


def test_the_name_of_this_machine_is_let_in_where_other_machines_are():
    own = f"{socket.gethostname()}:5000"
    assert refused("0.0.0.0", host=own) is None
    assert refused("node-17", host="node-17:5000") is None


@pytest.mark.parametrize("origin", ["null", "file://", "chrome-extension://abc"])
def test_an_origin_that_is_no_name_is_refused(origin):
    assert refused("127.0.0.1", host="localhost", origin=origin) == ("Origin", origin)


def test_who_names_nothing_is_no_browser():
    assert refused("127.0.0.1") is None
