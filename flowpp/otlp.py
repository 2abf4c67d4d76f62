"""Spans sent by OTLP over HTTP. Of `flowpp.tracing`, which loads this module only where traces are wanted."""

import logging
import re
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flowpp.tracing import Attributes, Kind, Span

FLUSH_SECONDS = 2
"""At the end of a process."""

_WARNING_SECONDS = 600
_TALKATIVE = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "consumer": trace.SpanKind.CONSUMER,
}
_PROPAGATOR = TraceContextTextMapPropagator()


class SentSpan(Span):
    """A span that is sent when it has ended."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def end(self, *, failed: bool = False) -> None:
        if failed:
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()

    def current(self) -> AbstractContextManager[object]:
        # an exception's message and traceback may hold what is secret
        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)


class Sender:
    """Sends spans from a thread: at most some thousand wait, further ones are dropped, and nobody waits for it.

    The provider is this process's alone, not the global one, which would have libraries send spans of their own.
    """

    def __init__(self, service: str) -> None:
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        for name in _TALKATIVE:
            logging.getLogger(name).addFilter(_SELDOM)
        logging.getLogger("opentelemetry.util.re").addFilter(_without_header)
        self._exporter = OTLPSpanExporter()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("flowpp")

    def begin(self, name: str, kind: Kind, parent: str, links: Sequence[str], attributes: Attributes) -> SentSpan:
        context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
        found = [trace.Link(_context(link)) for link in links if link]
        return SentSpan(self._tracer.start_span(name, context, _KINDS[kind], attributes, found))

    def close(self) -> None:
        """Sends what is left, in `FLUSH_SECONDS`; what cannot be sent then is lost."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)
        if ending.is_alive():
            logging.getLogger(_TALKATIVE[0]).warning("the process ends before they are")
            self._exporter.shutdown()  # which ends its waiting for another try


def _context(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(_PROPAGATOR.extract({"traceparent": traceparent})).get_span_context()


class _Seldom(logging.Filter):
    """Lets a line in ten minutes pass: without a collector there would be some for each batch.

    Of what is tried again none does: that is said with what is dropped, if it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._again_at = 0.0
        self._tried = ""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if record.levelno < logging.ERROR and "retrying" in said:
            self._tried = f" ({said})"
            return False
        if time.monotonic() < self._again_at:
            return False
        self._again_at = time.monotonic() + _WARNING_SECONDS
        if "retries" in said:  # which alone does not say why
            said, self._tried = said + self._tried, ""
        reason = re.sub(r"\?[^\s)'\"]*", "", said)  # an endpoint's query may hold a key
        record.msg, record.args = "traces are not sent, and are dropped meanwhile: %s", (reason,)
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None  # it would name the endpoint in full
        return True


_SELDOM = _Seldom()


def _without_header(record: logging.LogRecord) -> bool:
    """A filter of what is said of headers that cannot be read, and holds them."""
    record.msg, record.args = "OTEL_EXPORTER_OTLP_HEADERS is no list of name=value, with commas between", ()
    return True
