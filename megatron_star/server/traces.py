"""Traces of requests, for a collector of OpenTelemetry's where one is named: numbers, never a text."""

from importlib import import_module
from typing import Protocol
from urllib.parse import urlsplit

from megatron_star.server.traced_request import TracedRequest

EXTRA = "megatron-star[otel]"


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
