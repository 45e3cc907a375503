"""Traces where a collector is named, which needs a library that nobody else needs."""

from importlib import import_module

from megatron_star.server.traces import Traces

EXTRA = "megatron-star[otel]"


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
