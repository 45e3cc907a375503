"""Traces that a real collector gets of requests to a real server."""

import secrets
import sys
import threading
from itertools import pairwise
from time import time_ns

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from otlp_collector import Collector, attributes
from running_server import wait_for

import megatron_star
from megatron_star.server.otlp_traces import MOST_WAITING_SPANS, OtlpTraces
from megatron_star.server.settings import ServerSettings
from megatron_star.server.traced_request import TracedRequest
from megatron_star.server.traces import open_traces

PARTS = ["queue", "encode_context", "first_token", "generate"]
CONTEXT = "Anna lives in Lisbon. Karl lives in Oslo. " * 20


def a_trace() -> tuple[str, str, dict[str, str]]:
    """A trace id, a span id, and the header by which a client says that it is in them."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-01"}


def completion(**fields) -> dict:
    return {"model": "smollm2", "prompt": "Where is Karl?", "max_tokens": 3, "temperature": 0.5} | fields


def test_a_request_is_a_span_of_the_clients_trace_with_parts_and_counts_as_vllm_names_them(server, collector):
    trace_id, span_id, header = a_trace()
    before = time_ns()
    body = completion(contexts=[f"{secrets.token_hex(4)} {CONTEXT}"], n=2, ignore_eos=True, top_p=0.9)
    answer = server.post("/v1/completions", body, headers=header | {"X-Request-Id": "mine"}).json()
    wait_for(lambda: "llm_request" in collector.of_trace(trace_id))

    spans = collector.of_trace(trace_id)
    request, parts = spans.pop("llm_request"), [spans[name] for name in PARTS]
    assert (request.parent_span_id.hex(), request.kind) == (span_id, Span.SPAN_KIND_SERVER)
    assert {part.parent_span_id for part in parts} == {request.span_id}
    assert before <= request.start_time_unix_nano
    usage, star = answer["usage"], answer["usage"]["star"]
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.request.id": "mine",
        "gen_ai.response.model": "smollm2",
        "gen_ai.request.n": 2,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": pytest.approx(0.9),
        "gen_ai.usage.prompt_tokens": 2 * usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        "megatron_star.context_tokens": 2 * star["context_tokens"],
        "megatron_star.query_tokens": 2 * star["query_tokens"],
        "megatron_star.cached_tokens": star["context_tokens"],
    }
    found = attributes(request)
    assert {name: found.get(name) for name in expected} == expected
    latencies = {name: value for name, value in found.items() if name.startswith("gen_ai.latency.")}
    assert len(latencies) == 6 and min(latencies.values()) >= 0
    assert collector.resources["service.name"] == "megatron-star"
    assert collector.resources["service.version"] == megatron_star.__version__


def test_parts_follow_each_other_within_the_request(server, collector):
    trace_id, _, header = a_trace()
    server.post("/v1/completions", completion(contexts=[f"{trace_id} {CONTEXT}"]), headers=header)
    wait_for(lambda: len(collector.of_trace(trace_id)) == 5)

    spans = collector.of_trace(trace_id)
    request, parts = spans["llm_request"], [spans[name] for name in PARTS]
    assert all(one.end_time_unix_nano == two.start_time_unix_nano for one, two in pairwise(parts))
    # Clocks are read one after the other; a millisecond is more than lies between.
    assert request.start_time_unix_nano - 1_000_000 <= parts[0].start_time_unix_nano
    assert parts[-1].end_time_unix_nano <= request.end_time_unix_nano + 1_000_000
    assert all(part.end_time_unix_nano > part.start_time_unix_nano for part in parts)


def test_no_word_of_a_prompt_or_an_answer_is_sent(server, collector):
    trace_id, _, header = a_trace()
    chat = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Say: zanzibar"}],
        "max_tokens": 8,
        "stream": True,
        "user": "somebody",
    }
    server.post("/v1/chat/completions", chat, headers=header)
    server.post("/v1/chat/completions", chat | {"messages": [{"role": "zanzibar"}]}, headers=header)
    wait_for(lambda: len(collector.of_trace(trace_id)) >= 3)
    sent = b"".join(collector.bodies).lower()
    assert b"zanzibar" not in sent and b"somebody" not in sent


def test_a_refused_request_is_a_span_with_its_kind_of_error(server, collector):
    trace_id, _, header = a_trace()
    server.post("/v1/completions", completion(max_tokens="many"), headers=header)
    wait_for(lambda: collector.of_trace(trace_id))
    (span,) = collector.of_trace(trace_id).values()
    assert span.name == "POST /v1/completions"
    assert attributes(span)["error.type"] == "invalid_request"
    assert span.status.code == Status.STATUS_CODE_ERROR


def test_who_asks_how_it_is_leaves_no_trace_nor_does_a_client_that_samples_none(server, collector):
    asked, _, header = a_trace()
    httpx.get(f"{server.url}/v1/models", headers=header)
    unsampled, _, not_sampled = a_trace()
    not_sampled["traceparent"] = not_sampled["traceparent"][:-2] + "00"
    server.post("/v1/completions", completion(), headers=not_sampled)
    last, _, header = a_trace()
    server.post("/v1/completions", completion(), headers=header)
    wait_for(lambda: collector.of_trace(last))
    assert not collector.of_trace(asked) and not collector.of_trace(unsampled)


@pytest.mark.parametrize("header", ["", "00-0-0-0", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000])
def test_a_header_that_names_no_trace_begins_a_new_one(server, collector, header):
    name = secrets.token_hex(8)
    answer = server.post(
        "/v1/completions", completion(), headers={"traceparent": header, "X-Request-Id": name}
    )
    assert answer.status_code == 200
    wait_for(
        lambda: any(attributes(span).get("gen_ai.request.id") == name for span in collector.spans.copy())
    )


def a_request() -> TracedRequest:
    return TracedRequest(
        request_id="r",
        method="POST",
        route="/v1/completions",
        status=200,
        start_ns=1,
        end_ns=2,
        error=None,
        trace_headers={},
        answers=(),
    )


def test_a_collector_that_does_not_answer_costs_a_bounded_number_of_spans_and_nobody_waits():
    with Collector() as collector:
        collector.opened.clear()
        traces = OtlpTraces(collector.url, "m")
        for _ in range(5 * MOST_WAITING_SPANS):
            traces.note(a_request())
        traces.close(0.1)
        assert any(thread.name == "traces" for thread in threading.enumerate()), "it waited for the collector"
        assert not collector.spans
        collector.opened.set()
        wait_for(lambda: collector.spans)
    assert 0 < len(collector.spans) <= 2 * MOST_WAITING_SPANS


def test_what_is_left_is_sent_at_the_end():
    with Collector() as collector:
        traces = OtlpTraces(collector.url + "/v1/traces", "m")
        traces.note(a_request())
        traces.close(20)
        assert [span.name for span in collector.spans] == ["POST /v1/completions"]


def test_without_the_library_the_start_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_star.server.otlp_traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-star\[otel\]'"):
        open_traces("http://127.0.0.1:4318", "m")


@pytest.mark.parametrize(
    "url", ["collector:4318", "grpc://collector:4317", "http://", "http://[::1", "http://a:x"]
)
def test_what_is_no_address_of_a_collector_is_refused(url):
    with pytest.raises(ValueError, match="otlp_traces_endpoint is"):
        ServerSettings(model_name="m", otlp_traces_endpoint=url)
