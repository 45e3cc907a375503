"""Start, keys, backpressure, draining, and what happens when a rank or a client goes away."""

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import httpx
import pytest
from running_server import GOOD, wait_for

LONG = {"prompts": ["Count: one, two,"], "tokens_to_generate": 400, "top_k": 1, "stop_token": 0}


def gauge(server, name: str, **options) -> float:
    """A number of /metrics."""
    lines = httpx.get(f"{server.url}/metrics", **options).text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.split()[0] == f"megatron_star_{name}"))


def lines_after_text(stream) -> Iterator[str]:
    """The lines of a stream that come after its first token; the stream is closed when they are let go."""
    lines = stream.iter_lines()
    for line in lines:
        if '"content": "' in line and '"content": ""' not in line:
            return lines
    raise AssertionError("no token came")


def streamed_chat(client, server, num_tokens: int):
    """A stream of so many tokens at most."""
    body = {
        "model": "smollm2",
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Write a long story."}],
        "max_completion_tokens": num_tokens,
    }
    return client.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_health_says_that_a_rank_is_stopped_and_that_it_goes_on(server):
    def health() -> dict:
        return httpx.get(f"{server.url}/health").json()

    server.wait_until_ready()
    server.ranks[1].send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: not health()["ready"], 60)
        stopped = httpx.get(f"{server.url}/health")
        assert (stopped.status_code, stopped.json()["status"], stopped.json()["live"]) == (
            503,
            "stalled",
            True,
        )
        assert stopped.json()["trouble"].startswith("rank 1 has not been heard of for 5 s")
    finally:
        server.ranks[1].send_signal(signal.SIGCONT)
    wait_for(lambda: health()["ready"], 60)
    assert server.put().status_code == 200


def test_health_and_metrics_say_how_it_is(server):
    server.put()
    assert httpx.get(f"{server.url}/health").json() == {
        "status": "ready",
        "live": True,
        "ready": True,
        "draining": False,
    }
    metrics = httpx.get(f"{server.url}/metrics").text
    for name in (
        "waiting",
        "running",
        "ttft_seconds_bucket",
        "tpot_seconds_bucket",
        "context_cache_hits_total",
    ):
        assert f"megatron_star_{name}" in metrics
    for labelled in ('tokens_total{kind="generated"}', 'kv_bytes{cp_rank="1"}'):
        assert f"megatron_star_{labelled}" in metrics


def test_a_refused_request_is_counted_by_its_kind(server):
    counts = []
    for _ in range(2):
        assert server.put({"prompts": []}).status_code == 400
        counts.append(gauge(server, 'errors_total{kind="invalid_request"}'))
    assert counts[1] == counts[0] + 1


def test_the_log_has_one_line_of_json_a_request_and_nothing_of_its_text(server):
    request_id = server.put(GOOD | {"prompts": ["The secret word is"]}).headers["x-request-id"]
    wait_for(lambda: request_id in server.log())

    line = next(json.loads(line) for line in server.log().splitlines() if request_id in line)
    assert (line["route"], line["status"], line["generated_tokens"]) == ("/api", 200, 1)
    assert "secret" not in server.log()


def test_a_client_that_goes_away_cancels_its_request(server):
    with httpx.Client() as client, streamed_chat(client, server, 2000) as stream:
        still_open = lines_after_text(stream)
        assert gauge(server, "running") >= 1
        del still_open
    with pytest.raises(httpx.ReadTimeout):
        httpx.put(f"{server.url}/api", json=LONG | {"tokens_to_generate": 4000}, timeout=1)

    wait_for(lambda: gauge(server, "running") == 0 and gauge(server, "waiting") == 0)


def test_a_stream_that_is_broken_off_is_logged_and_counted_as_such(server):
    def num_gone() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if 'errors_total{kind="client_gone"}' in line)

    before = num_gone()
    with httpx.Client() as client, streamed_chat(client, server, 2000) as stream:
        request_id = stream.headers["x-request-id"]
        lines_after_text(stream)
    wait_for(lambda: request_id in server.log())

    line = next(json.loads(line) for line in server.log().splitlines() if request_id in line)
    assert (line["status"], line["error"], line["unfinished"]) == (200, "client_gone", 1)
    assert 0 < line["generated_tokens"] < 2000
    assert num_gone() == before + 1


def test_an_encoding_that_takes_long_is_reported_in_the_stream(server):
    body = {
        "model": "smollm2",
        "stream": True,
        "messages": [{"role": "user", "content": "One more of many words. " * 400}],
        "max_completion_tokens": 1,
    }
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
        comments = [line for line in stream.iter_lines() if line.startswith(":")]
    assert any("context tokens" in comment for comment in comments)


def test_a_taken_port_is_one_line_and_ends_all_ranks(server, start):
    second = start(port=server.port)
    assert second.statuses(60) == [2, 2]
    errors = [
        line for rank in range(2) for line in second.log(rank).splitlines() if line.startswith("error:")
    ]
    assert errors == [f"error: cannot listen on 127.0.0.1 port {server.port}: Address already in use"]


def status_line(connection: socket.socket) -> bytes:
    """The first line of an answer; empty if the connection is closed without one."""
    connection.settimeout(20)
    return connection.recv(4096).split(b"\r\n")[0]


def test_keys_places_slow_clients_and_a_drain_in_which_nothing_is_lost(start, tmp_path):
    (tmp_path / "key").write_text("right-key\n")
    limits = ["--max-concurrent-requests", "1", "--max-queued-requests", "1", "--request-body-seconds", "1"]
    server = start("--api-key-file", str(tmp_path / "key"), *limits, "--drain-seconds", "60")
    server.wait_until_ready()
    key = {"Authorization": "Bearer right-key"}

    def put(body, headers=key):
        return httpx.put(f"{server.url}/api", json=body, headers=headers, timeout=60)

    assert put(GOOD, {}).status_code == put(GOOD, {"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert put(GOOD).status_code == 200
    assert httpx.get(server.url).status_code == httpx.get(f"{server.url}/health").status_code == 200

    head = "PUT /api HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right-key\r\nContent-Length: 9\r\n\r\n"
    for sent, answer in ((head + "{", b"HTTP/1.1 408 Request Timeout"), (head[:20], b""), ("", b"")):
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(sent.encode())
            assert status_line(slow) == answer

    too_many = put(LONG | {"prompts": ["a", "b", "c"]})
    assert too_many.status_code == 400
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(put, LONG | {"tokens_to_generate": 60}) for _ in range(2)]
        wait_for(lambda: gauge(server, "waiting", headers=key) == gauge(server, "running", headers=key) == 1)
        assert put(GOOD).status_code == 429
        server.signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/health").json()["draining"])
        refused = put(GOOD)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert [len(future.result().json()["tokens"][0]) for future in running] == [66, 66]
    assert server.statuses(15) == [0, 0]
    assert sorted(path.name for path in (tmp_path / "0").rglob("*")) == ["rank0.log", "rank1.log"]


def test_when_the_time_to_drain_is_over_what_runs_gets_an_error_and_all_ranks_end_with_0(start):
    server = start("--drain-seconds", "1")
    server.wait_until_ready()
    with httpx.Client() as client, streamed_chat(client, server, 4000) as stream:
        lines = lines_after_text(stream)
        server.signal(signal.SIGTERM)
        rest = list(lines)
    assert "the server stops" in rest[-2]
    assert server.statuses(15) == [0, 0]
    line = next(json.loads(line) for line in server.log().splitlines() if "generated_tokens" in line)
    assert (line["status"], line["error"]) == (200, "unavailable")


def test_a_killed_worker_under_load_breaks_the_stream_and_ends_the_job(start):
    server = start()
    server.wait_until_ready()
    with httpx.Client() as client, streamed_chat(client, server, 4000) as stream:
        lines = lines_after_text(stream)
        server.ranks[1].kill()
        begin = monotonic()
        with pytest.raises(httpx.HTTPError):
            list(lines)
    assert server.ranks[0].wait(timeout=10) == 1
    assert monotonic() - begin < 10
    assert "error: rank 1 has ended; all ranks stop" in server.log()
