"""Several keys on a running server: their contexts, limits, priorities and numbers are their own."""

import json
import signal
from collections.abc import Iterator
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from running_server import RunningServer, start_server

KEYS = """
[anna]
key = "first"
highest_priority = -3
[karl]
key = "second"
max_tokens = 2000
"""
DOCUMENT = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 40


@pytest.fixture(scope="module")
def keyed(smollm2, tmp_path_factory) -> Iterator[RunningServer]:
    """A server with the keys of two tenants."""
    directory = tmp_path_factory.mktemp("keyed")
    path = directory / "keys.toml"
    path.write_text(KEYS)
    path.chmod(0o604)
    options = ("--served-model-name", "smollm2", "--api-key-file", str(path), "--star-block-size", "256")
    server = start_server(smollm2[1], directory, *options)
    server.wait_until_ready()
    yield server
    server.end()


def ask(server: RunningServer, key: str, question: str = "What?", **fields: Any) -> httpx.Response:
    """A completion about the document."""
    body = {"model": "smollm2", "prompt": question, "contexts": [DOCUMENT], "max_tokens": 1} | fields
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


def cached_tokens(answer: httpx.Response) -> int:
    return answer.json()["usage"]["star"]["cached_tokens"]


def test_contexts_of_other_keys_and_salts_are_encoded_anew_and_not_seen(keyed):
    fields = ({}, {"cache_salt": "x"}, {"cache_salt": "y"})
    for key in ("first", "second"):
        for more in fields:
            assert cached_tokens(ask(keyed, key, **more)) == 0
            assert cached_tokens(ask(keyed, key, "Why?", **more)) > 500


def test_more_tokens_than_a_key_may_have_are_refused_by_the_limits_name(keyed):
    answer = ask(keyed, "second", max_tokens=1500)
    assert answer.status_code == 400 and "2000 of key 'karl' (max_tokens)" in answer.json()["message"]
    assert ask(keyed, "first", max_tokens=1500, stop=[" "]).status_code == 200


def test_a_priority_is_bounded_by_the_key(keyed):
    assert ask(keyed, "first", priority=-3).status_code == 200
    for key, priority in (("first", -4), ("second", -1)):
        refused = ask(keyed, key, priority=priority)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    for wrong in ({"priority": 1.5}, {"priority": 1 << 31}, {"cache_salt": ""}, {"cache_salt": "x" * 513}):
        assert ask(keyed, "first", **wrong).json()["error"]["param"] in wrong


def test_numbers_of_each_key_are_in_the_log_and_in_metrics(keyed):
    ask(keyed, "first")
    lines = [json.loads(line) for line in keyed.log().splitlines() if line.startswith("{")]
    assert {"anna"} <= {line.get("key") for line in lines}
    assert "first" not in keyed.log() and "chmod 600" in keyed.log()
    headers = {"Authorization": "Bearer second"}
    metrics = httpx.get(f"{keyed.url}/metrics", headers=headers).text
    assert 'megatron_star_key_tokens_total{key="anna",kind="generated"}' in metrics
    assert 'megatron_star_key_sequences_in_flight{key="anna"} 0.0' in metrics
    assert 'megatron_star_key_tokens_in_flight{key="anna"} 0.0' in metrics


def test_bodies_without_a_key_take_no_memory(keyed):
    ask(keyed, "first")
    before = keyed.resident_bytes()
    body = b'{"model": "smollm2", "prompt": "' + b"x" * (1 << 20) + b'"}'
    for _ in range(100):
        assert httpx.post(f"{keyed.url}/v1/completions", content=body).status_code == 401
    assert ask(keyed, "first").status_code == 200
    assert keyed.resident_bytes() - before < 32 << 20


def test_keys_are_read_anew_at_a_signal(keyed):
    path = next(keyed.logs[0].parent.glob("keys.toml"))
    path.write_text(KEYS.replace('"second"', '"another"'))
    keyed.ranks[0].send_signal(signal.SIGHUP)
    deadline = monotonic() + 30
    while ask(keyed, "another").status_code == 401:
        assert monotonic() < deadline
        sleep(0.1)
    assert ask(keyed, "second").status_code == 401
    assert ask(keyed, "first").status_code == 200
