"""What a trace says of one HTTP request."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_star.engine.answer import Answer


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
