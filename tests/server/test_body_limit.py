"""Bytes that are charged for bodies, and given back."""

import asyncio

import pytest

from megatron_star.server.middleware import BODIES_IN_FLIGHT, BodyLimit
from megatron_star.server.record import record_of
from megatron_star.server.settings import ServerSettings

LIMIT = 100


def ask(limit: BodyLimit, path: str, size: int) -> int | None:
    """A request with a body of so many bytes; the status of its answer, if it is refused."""
    statuses = []

    async def receive():
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    async def send(message):
        statuses.append(message.get("status"))

    asyncio.run(limit({"type": "http", "path": path, "method": "PUT"}, receive, send))
    return statuses[0] if statuses else None


def bytes_in_route(path: str, takes: bool) -> tuple[int, int]:
    """What is charged for a body of 100 bytes while its route runs, and afterwards."""
    seen = []

    async def route(scope, receive, send):
        if takes:
            record_of(scope).body_taken()
        seen.append(limit.bytes_in_flight)

    limit = BodyLimit(route, ServerSettings(model_name="m", max_request_bytes=LIMIT))
    ask(limit, path, LIMIT)
    return seen[0], limit.bytes_in_flight


@pytest.mark.parametrize(
    ("path", "takes", "charged"),
    [("/api", False, LIMIT), ("/api", True, 0), ("/", False, 0), ("/health", False, 0)],
)
def test_a_body_is_charged_until_it_is_checked_and_not_at_all_on_an_open_path(path, takes, charged):
    assert bytes_in_route(path, takes) == (charged, 0)


def test_what_is_too_large_or_too_much_at_once_is_refused():
    limit = BodyLimit(None, ServerSettings(model_name="m", max_request_bytes=LIMIT))
    assert ask(limit, "/api", LIMIT + 1) == 413
    limit.bytes_in_flight = BODIES_IN_FLIGHT * LIMIT - 10
    assert ask(limit, "/api", 11) == 503
    assert limit.bytes_in_flight == BODIES_IN_FLIGHT * LIMIT - 10
