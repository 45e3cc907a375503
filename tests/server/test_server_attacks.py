"""What strangers, and clients that break HTTP, can do to a running server: nothing that others notice."""

import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse, RemoteDisconnected
from time import sleep

import httpx
import pytest
from running_server import GOOD, RunningServer, start_server

from megatron_star.server.connection import MOST_SMALL_CHUNKS

KEY = {"Authorization": "Bearer right-key"}
KEY_HEADER = "Authorization: Bearer right-key"
LIMIT = 1 << 16
NUM_CONNECTIONS = 2 * 2 + 64  # of a server with two places
PATIENCE = 30


@pytest.fixture(scope="module")
def unread() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe with room for 64 KB, which is read only where a test does."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read, write
    os.close(read)


@pytest.fixture(scope="module")
def locked(smollm2, tmp_path_factory, unread) -> Iterator[RunningServer]:
    """A server with a key, two places and small limits, which writes into that pipe."""
    directory = tmp_path_factory.mktemp("locked")
    (directory / "key").write_text("right-key\n")
    limits = [
        "--max-request-bytes",
        str(LIMIT),
        "--max-concurrent-requests",
        "1",
        "--max-queued-requests",
        "1",
    ]
    server = start_server(
        smollm2[1],
        directory,
        *("--served-model-name", "smollm2", "--api-key-file", str(directory / "key")),
        *("--request-body-seconds", "3", "--keep-alive-seconds", "2", *limits),
        driver_output=unread[1],
    )
    os.close(unread[1])
    server.wait_until_ready()
    yield server
    server.end()


@contextmanager
def connected(server, *sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        for part in sent:
            connection.sendall(part)
        yield connection


def head(line: str = "PUT /api", *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def status(connection: socket.socket) -> int | None:
    """Of the next answer, which is read to its end; None if the connection is closed without one."""
    answer = HTTPResponse(connection)
    try:
        answer.begin()
        answer.read()
    except (RemoteDisconnected, ConnectionResetError):
        return None
    return answer.status


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side closes it, sooner or later."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_bodies_that_dribble_to_open_paths_take_nothing_from_those_with_a_key(locked):
    with ExitStack() as stack:
        for path, count in (
            ("POST /", 20),
            ("POST /health", 20),
            ("PUT /api", 5),
            ("POST /v1/completions", 5),
        ):
            for _ in range(count):
                start = head(path, f"Content-Length: {LIMIT}")
                stack.enter_context(connected(locked, start, b"x" * (LIMIT - 1)))
        assert httpx.put(f"{locked.url}/api", json=GOOD, headers=KEY, timeout=PATIENCE).status_code == 200


def test_whoever_has_no_key_cannot_take_all_connections(locked):
    with connected(locked) as mine:
        mine.sendall(head("GET /v1/models", KEY_HEADER))
        assert status(mine) == 200
        with ExitStack() as stack:
            for _ in range(NUM_CONNECTIONS + 20):
                stack.enter_context(connected(locked, b"GET / HT"))
            mine.sendall(head("GET /v1/models", KEY_HEADER))
            assert status(mine) == 200
            assert httpx.put(f"{locked.url}/api", json=GOOD, headers=KEY, timeout=PATIENCE).status_code == 200


@pytest.mark.parametrize("line", ["POST /", "PUT /api"])
def test_a_body_that_nobody_waits_for_ends_the_connection_after_the_answer_was_read(locked, line):
    with connected(locked, head(line, "Content-Length: 100000000"), b"x" * (4 << 20)) as connection:
        assert status(connection) in (401, 405)
        assert is_closed(connection)


def test_a_body_that_is_too_large_is_refused_at_once_and_the_answer_is_read(locked):
    answer = httpx.put(f"{locked.url}/api", content=b" " * (100 * LIMIT), headers=KEY, timeout=PATIENCE)
    assert answer.status_code == 413


BROKEN = {
    "a chunk without a size": b"xyz\r\n",
    "a chunk that is longer than it says": b"1\r\nabc\r\n",
    "a size that is too long": b"f" * 30_000,
    "no HTTP at all": b"\x16\x03\x01\r\n",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("key", [(), (KEY_HEADER,)], ids=["no key", "key"])
def test_a_broken_chunk_is_refused_without_a_traceback(locked, unread, broken, key):
    chunked = head("PUT /api", "Transfer-Encoding: chunked", *key)
    for sent in ([chunked, broken], [chunked + broken], [chunked + b"1\r\n{\r\n", broken]):
        with connected(locked, *sent[:1]) as connection:
            sleep(0.05)
            for part in sent[1:]:
                connection.sendall(part)
            assert status(connection) in ((400,) if key else (400, 401))
            assert is_closed(connection)
    assert b"raceback" not in os.read(unread[0], 1 << 20)


REQUESTS = [
    head("PUT /api", "Content-Type: application/json", "Content-Length: 18", KEY_HEADER)
    + b'{"prompts": ["x"]}',
    head("PUT /api", "Transfer-Encoding: chunked", KEY_HEADER) + b'5\r\n{"a":\r\n3\r\n 1}\r\n0\r\n\r\n',
    head("GET /health") + head("GET /v1/models", KEY_HEADER),
    head(
        "PUT /api", "Expect: 100-continue", "Connection: Upgrade", "Upgrade: websocket", "Content-Length: 3"
    ),
]


def mutated(request: bytes, generator: random.Random) -> bytes:
    """With a few bytes changed, taken out, doubled or put in."""
    changed = bytearray(request)
    for _ in range(generator.choice([1, 1, 2, 5])):
        at, size = generator.randrange(len(changed) or 1), generator.randrange(1, 20)
        changed[at : at + generator.choice([0, 1, size])] = generator.choice(
            [b"", generator.randbytes(size), changed[at : at + 2 * size], b"\r\n", b"\0", b"\xff", b"9" * 30]
        )
    return bytes(changed)


def test_requests_with_bytes_changed_get_no_500_and_no_traceback(locked, unread):
    generator = random.Random(0)
    for _ in range(300):
        request = mutated(generator.choice(REQUESTS), generator)
        with suppress(OSError), connected(locked, request) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert not connection.recv(1 << 16).startswith(b"HTTP/1.1 5")
    assert b"raceback" not in os.read(unread[0], 1 << 20)


def test_very_many_very_small_chunks_are_refused(locked):
    chunks = b"1\r\n \r\n" * (MOST_SMALL_CHUNKS + 1)
    with connected(locked, head("PUT /api", "Transfer-Encoding: chunked", KEY_HEADER)) as one:
        one.sendall(chunks)
        assert status(one) == 400


def test_a_head_is_bounded_however_fast_it_comes(locked):
    many = [f"a{index}: b" for index in range(20_000)]
    with connected(locked, head("GET /health", *many)) as connection:
        assert status(connection) in (400, None)


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}]
)
@pytest.mark.parametrize("path", ["/", "/health", "/api", "/v1/models", "/nowhere"])
def test_a_page_of_a_stranger_gets_nothing_where_there_is_no_key(server, path, headers):
    answer = httpx.put(f"{server.url}{path}", json=GOOD, headers=headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_what_a_page_elsewhere_may_send_unasked_is_no_request(server):
    sent = httpx.put(f"{server.url}/api", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert sent.status_code == 400
    assert "application/json" in sent.json()["message"]


def test_with_a_key_any_name_will_do(locked):
    assert httpx.get(f"{locked.url}/v1/models", headers=KEY | {"Host": "model.example"}).status_code == 200


@pytest.mark.parametrize("path", ["/api/", "/v1/models/", "/health/", "//evil.example/.."])
def test_nobody_is_redirected(server, path):
    assert httpx.put(f"{server.url}{path}", json=GOOD).status_code in (404, 405)


def test_three_megabytes_of_wrong_numbers_are_one_error_and_no_memory(server):
    server.put()
    before = server.resident_bytes()
    for body in (b'{"prompt": [' + b"-1," * (1 << 20) + b"1]}", b"{" + b'"a":{},' * 400_000 + b'"a":1}'):
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{server.url}/completions", content=body, headers=headers, timeout=PATIENCE)
        assert answer.status_code == 400
        assert len(answer.content) < 1000
    assert server.resident_bytes() - before < 100 << 20


def test_a_client_that_reads_no_answers_is_cut_off(locked):
    with connected(locked, head("GET /health") * 10) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        connection.settimeout(0.2)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(PATIENCE * 5):
                with suppress(TimeoutError):
                    connection.sendall(head("GET /") * 500)
                sleep(0.05)


def test_an_idle_connection_is_closed_after_the_time_that_was_set(locked):
    with connected(locked, head("GET /health")) as connection:
        assert status(connection) == 200
        assert is_closed(connection)


def test_a_log_that_nobody_reads_stops_nothing_not_even_the_end(locked):
    with httpx.Client() as client:
        for _ in range(600):
            assert client.get(f"{locked.url}/nowhere").status_code == 401
        assert client.put(f"{locked.url}/api", json=GOOD, headers=KEY, timeout=PATIENCE).status_code == 200
        metrics = client.get(f"{locked.url}/metrics", headers=KEY).text
    assert "megatron_star_log_lines_dropped_total" in metrics
    locked.signal(signal.SIGTERM)
    assert locked.statuses(30) == [0, 0]
