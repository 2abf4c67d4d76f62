"""A collector of traces: a real server on loopback, which decodes what it is sent by OTLP over HTTP."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tests.waiting import until

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@dataclass(frozen=True)
class Told:
    """A span; ids are hexadecimal, and `parent` is empty where it has none."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    links: list[str]
    attributes: dict[str, Any]
    failed: bool

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace}-{self.id}-01"


@dataclass
class Collector:
    """`received` is all that it was sent, as it was sent; `leave` has it gone. Its first `refusals` answers are 503."""

    url: str
    leave: Callable[[], None]
    spans: list[Told] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    refusals: int = 0

    def named(self, name: str) -> list[Told]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Told:
        """The only span of that name, which may be still on its way."""
        self.until(lambda: bool(self.named(name)))
        [found] = self.named(name)
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        until(condition, lambda: [span.name for span in self.spans])

    def take(self, body: bytes) -> None:
        self.received.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for span in [span for scope in resource.scope_spans for span in scope.spans]:
                self.spans.append(
                    Told(
                        service,
                        span.name,
                        span.kind,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        [link.span_id.hex() for link in span.links],
                        _values(span.attributes),
                        span.status.code == span.status.STATUS_CODE_ERROR,
                    )
                )


def _values(attributes: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, str(pair.value.WhichOneof("value")))

    return {pair.key: value(pair) for pair in attributes}


@contextmanager
def collecting(environment: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector for the block, at the end of which it is gone; `environment` names it, and hurries what is sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if collector.refusals:
                collector.refusals -= 1
                self.send_response(503)
            else:
                collector.take(sent)
                self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def leave() -> None:
        server.shutdown()
        server.server_close()

    collector = Collector(f"http://127.0.0.1:{server.server_port}", leave)
    environment.setenv(ENDPOINT, collector.url)
    environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield collector
    finally:
        leave()
