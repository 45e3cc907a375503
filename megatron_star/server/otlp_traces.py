"""Traces by OpenTelemetry's own library, sent as OTLP over HTTP from a thread of its own.

Its variables apply (`OTEL_SERVICE_NAME`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER` and so on).
Names of attributes are vLLM's. Spans are made when a request has ended, from times that were noted anyway.
"""

import threading
from collections.abc import Iterator
from time import monotonic_ns, time_ns
from typing import NamedTuple
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import megatron_star
from megatron_star.engine.answer import Answer
from megatron_star.engine.request import StarResult
from megatron_star.server.traced_request import TracedRequest

MOST_WAITING_SPANS = 2048
MOST_SEQUENCES = 8
"""Of a request, that get spans of their own; the request's span counts all."""
PATH = "/v1/traces"
NS = 1e9


class _Part(NamedTuple):
    """What a sequence waited for: a span's name, and when, in nanoseconds since 1970."""

    name: str
    start_ns: int
    end_ns: int


class OtlpTraces:
    """See `Traces`."""

    def __init__(self, endpoint: str, model: str) -> None:
        """endpoint: a URL; one without a path gets OTLP's."""
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.removesuffix("/") + PATH
        resource = Resource({"service.name": "megatron-star", "service.version": megatron_star.__version__})
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, MOST_WAITING_SPANS))
        self._tracer = self._provider.get_tracer("megatron_star.server", megatron_star.__version__)
        self._propagator, self._model = TraceContextTextMapPropagator(), model

    def note(self, request: TracedRequest) -> None:
        """See `Traces`."""
        answers = request.answers
        span = self._tracer.start_span(
            "llm_request" if answers else f"{request.method} {request.route}",
            context=self._propagator.extract(request.trace_headers),
            kind=SpanKind.SERVER,
            start_time=request.start_ns,
            attributes=_of_http(request),
        )
        if span.is_recording():
            if answers:
                span.set_attributes(_of_answers(request, self._model))
            if request.status >= 500 or request.error:
                span.set_attribute("error.type", request.error or str(request.status))
                span.set_status(Status(StatusCode.ERROR))
            self._note_parts(span, answers)
        span.end(request.end_ns)

    def close(self, seconds: float) -> None:
        """See `Traces`. The library would wait longer for a collector that does not answer."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(seconds)

    def _note_parts(self, span: Span, answers: list[Answer]) -> None:
        context: Context = set_span_in_context(span)
        for index, answer in enumerate(answers[:MOST_SEQUENCES]):
            if not answer.ended.is_set():
                continue
            for part in _parts(answer):
                child = self._tracer.start_span(part.name, context, start_time=part.start_ns)
                child.set_attribute("megatron_star.sequence", index)
                child.end(part.end_ns)


def _parts(answer: Answer) -> Iterator[_Part]:
    """What there was of waiting, encoding its context, its first token and those after it."""
    result = answer.result()
    times = result.timings
    seconds = {
        "queue": times.queue_s,
        "encode_context": times.context_encoding_s if result.num_context_tokens else 0.0,
        "first_token": times.query_s if result.tokens else 0.0,
        "generate": _decode_seconds(result),
    }
    start = time_ns() - monotonic_ns() + int(answer.submitted_at * NS)
    for name, duration in seconds.items():
        end = start + int(duration * NS)
        if duration:
            yield _Part(name, start, end)
        start = end


def _of_http(request: TracedRequest) -> dict[str, AttributeValue]:
    return {
        "http.request.method": request.method,
        "http.route": request.route,
        "http.response.status_code": request.status,
        "gen_ai.request.id": request.request_id,
    }


def _of_answers(request: TracedRequest, model: str) -> dict[str, AttributeValue]:
    """Counts of all sequences, and the slowest one's times in seconds, by vLLM's names; then ours."""
    answers = request.answers
    asked = [answer.request for answer in answers]
    sampling = asked[0].sampling
    results = [answer.result() for answer in answers if answer.ended.is_set()]
    context_tokens = sum(len(one.context_tokens) for one in asked)
    query_tokens = sum(len(one.query_tokens) for one in asked)
    return {
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": sampling.num_tokens_to_generate,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p or 1.0,
        "gen_ai.request.n": len(answers),
        "gen_ai.usage.num_sequences": len(answers),
        "gen_ai.usage.prompt_tokens": context_tokens + query_tokens,
        "gen_ai.usage.completion_tokens": sum(len(answer.tokens) for answer in answers),
        "gen_ai.latency.e2e": (request.end_ns - request.start_ns) / NS,
        **(_latencies(results) if results else {}),
        "megatron_star.context_tokens": context_tokens,
        "megatron_star.query_tokens": query_tokens,
        "megatron_star.cached_tokens": sum(result.num_cached_tokens for result in results),
    }


def _latencies(results: list[StarResult]) -> dict[str, float]:
    slowest = max(results, key=lambda result: result.timings.queue_s + result.timings.ttft_s)
    times, decode = slowest.timings, _decode_seconds(slowest)
    return {
        "gen_ai.latency.time_in_queue": times.queue_s,
        "gen_ai.latency.time_to_first_token": times.queue_s + times.ttft_s,
        "gen_ai.latency.time_in_model_prefill": times.ttft_s,
        "gen_ai.latency.time_in_model_decode": decode,
        "gen_ai.latency.time_in_model_inference": times.ttft_s + decode,
    }


def _decode_seconds(result: StarResult) -> float:
    return result.timings.tpot_s * max(0, len(result.tokens) - 1)
