"""Traces of requests, for a collector of OpenTelemetry's where one is named: numbers, never a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol
from urllib.parse import urlsplit

from megatron_star.engine.answer import Answer

EXTRA = "megatron-star[otel]"


@dataclass(frozen=True, kw_only=True)
class TracedRequest:
    """An HTTP request that has ended.

    Attributes:
        start_ns, end_ns: since 1970.
        error: its kind, see `errors.KINDS`.
        trace_headers: what the client said of its own trace: `traceparent`, `tracestate`.
        answers: sequences that it asked for, ended or not.
    """

    request_id: str
    method: str
    route: str
    status: int
    start_ns: int
    end_ns: int
    error: str | None
    trace_headers: dict[str, str]
    answers: Sequence[Answer]


class Traces(Protocol):
    """Where traces go."""

    def note(self, request: TracedRequest) -> None:
        """Hand one over; nobody waits, and what there is no room for is dropped."""

    def close(self, seconds: float) -> None:
        """Send what is left, within so many seconds."""


def check_endpoint(url: str) -> None:
    """Raises ValueError if this is no address of a collector."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"otlp_traces_endpoint is {url!r}: it must be as http://collector:4318/v1/traces")


def open_traces(endpoint: str, model: str) -> Traces:
    """Traces of answers of this model, sent to this address.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    try:
        module = import_module("megatron_star.server.otlp_traces")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ValueError(
            f"--otlp-traces-endpoint needs OpenTelemetry's SDK: pip install '{EXTRA}' ({error})"
        ) from error
    return module.OtlpTraces(endpoint, model)
