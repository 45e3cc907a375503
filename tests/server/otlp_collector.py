"""A collector of OpenTelemetry's traces: it takes OTLP over HTTP and keeps the last spans."""

import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

MOST_SPANS = 20_000


class Collector:
    """Listens while it is entered.

    Attributes:
        spans: as they came.
        bodies: all bytes that came.
        resources: attributes of who sent them.
        opened: while this is not set, requests get no answer.
    """

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=MOST_SPANS)
        self.bodies: deque[bytes] = deque(maxlen=MOST_SPANS)
        self.resources: dict[str, Any] = {}
        self.opened = threading.Event()
        self.opened.set()

    def __enter__(self) -> "Collector":
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.opened.wait()
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Without OTLP's path, which the sender adds."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, body: bytes) -> None:
        """One request of a sender."""
        assert path == "/v1/traces"
        self.bodies.append(body)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources = attributes(of_resource.resource)
            self.spans.extend(span for scope in of_resource.scope_spans for span in scope.spans)

    def of_trace(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace, by name."""
        return {span.name: span for span in self.spans.copy() if span.trace_id.hex() == trace_id}


def attributes(owner: Any) -> dict[str, Any]:
    """Of a span or a resource."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in owner.attributes}
