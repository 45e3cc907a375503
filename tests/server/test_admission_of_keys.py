"""Who is let in: nothing of a stranger is read, and keys are held to their limits before a body is."""

import asyncio
import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest

from megatron_star.server.keys import KeyRing, parse_keys
from megatron_star.server.middleware import AccessLog, Admission, BodyLimit
from megatron_star.server.record import record_of
from megatron_star.server.settings import ServerSettings

KEYS = "[anna]\nkey = 'first'\nmax_requests = 2\n[karl]\nkey = 'second'\n"


class Door:
    """The middleware in front of an application that waits; what was read of bodies, and who got in."""

    def __init__(self) -> None:
        settings = ServerSettings(model_name="m", keys=KeyRing(parse_keys(KEYS, "keys")))
        self.state = SimpleNamespace(ready=True, name="ready", num_active=0)
        self.metrics = SimpleNamespace(note_response=lambda **_: None)
        self.num_read, self.inside, self.open = 0, Counter(), asyncio.Event()
        app = BodyLimit(self._wait, settings)
        self.body_limit = app
        self.app = AccessLog(Admission(app, settings, self.state), self.metrics)

    async def _wait(self, scope, receive, send) -> None:
        self.inside[record_of(scope).tenant] += 1
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def request(self, key: str | None, method: str = "POST") -> tuple[int, dict[str, str], str]:
        """Status, headers and body of the answer to a request with a body of 1 MB."""
        sent = []

        async def receive():
            self.num_read += 1
            return {"type": "http.request", "body": b"x" * (1 << 20), "more_body": False}

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "method": method, "path": "/v1/completions", "headers": headers}
        await self.app(scope, receive, send)
        start, *bodies = sent
        names = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return start["status"], names, b"".join(one.get("body", b"") for one in bodies).decode()


@pytest.mark.parametrize("key", [None, "", "third", "firs", "first2"])
def test_nothing_of_a_strangers_body_is_read_and_nobody_is_held_up(key):
    async def many() -> None:
        door = Door()
        answers = await asyncio.gather(*[door.request(key) for _ in range(500)])
        assert {status for status, *_ in answers} == {401}
        assert (door.num_read, door.inside, door.state.num_active) == (0, Counter(), 0)
        assert door.body_limit.bytes_in_flight == 0

    asyncio.run(many())


def test_a_key_with_all_its_requests_inside_is_refused_unread_and_others_are_let_in():
    async def some() -> None:
        door = Door()
        running = [asyncio.create_task(door.request(key)) for key in ("first", "first", "second")]
        await asyncio.sleep(0)
        num_read = door.num_read
        status, headers, body = await asyncio.wait_for(door.request("first"), 20)
        assert (status, headers["retry-after"]) == (429, "1")
        assert "'anna' has 2 of 2 requests in flight (max_requests)" in json.loads(body)["message"]
        assert door.num_read == num_read
        running.append(asyncio.create_task(door.request("first", "GET")))
        await asyncio.sleep(0)
        door.open.set()
        assert {(await one)[0] for one in running} == {200}
        assert door.inside == {"anna": 3, "karl": 1}
        assert (await door.request("first"))[0] == 200

    asyncio.run(some())


def test_the_name_of_a_key_is_in_the_log_and_the_key_is_not(caplog):
    logging.getLogger("megatron_star.server").propagate = True
    with caplog.at_level(logging.INFO, "megatron_star.server"):

        async def two() -> None:
            door = Door()
            door.open.set()
            await door.request("first")
            await door.request("third")

        asyncio.run(two())
    known, stranger = (record.fields for record in caplog.records)
    assert known["key"] == "anna" and "key" not in stranger
    assert not any("first" in str(fields) or "third" in str(fields) for fields in (known, stranger))
