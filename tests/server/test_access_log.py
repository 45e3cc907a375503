"""What the access log and the counters say of requests that did not end well."""

import asyncio

import pytest

from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.middleware import AccessLog

START = {"type": "http.response.start", "status": 200}
PART, LAST = ({"type": "http.response.body", "body": b"x", "more_body": more} for more in (True, False))


@pytest.mark.parametrize(
    ("sent", "raised", "status", "error"),
    [
        ([START, PART, LAST], None, "200", None),
        ([START, PART], None, "200", "client_gone"),
        ([], None, "499", "client_gone"),
        ([], KeyError("a bug"), "500", "internal_error"),
        ([START, PART], KeyError("a bug"), "200", "internal_error"),
    ],
    ids=["whole", "broken off", "no answer", "a bug", "a bug in a stream"],
)
def test_each_end_of_a_request_is_counted_as_what_it_is(sent, raised, status, error):
    async def app(scope, receive, send):
        for message in sent:
            await send(dict(message))
        if raised:
            raise raised

    async def nothing(*_):
        pass

    metrics = ServerMetrics()
    try:
        asyncio.run(AccessLog(app, metrics)({"type": "http", "method": "PUT"}, nothing, nothing))
    except KeyError:
        assert raised

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"megatron_star_{name}_total", labels)

    assert value("http_requests", route="other", method="PUT", status=status) == 1
    for kind in ("client_gone", "internal_error"):
        assert value("errors", kind=kind) == (1 if kind == error else None)
