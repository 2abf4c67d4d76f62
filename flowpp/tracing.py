"""Traces: spans of what is done here, sent to where OpenTelemetry's variables say; where they say nothing, nothing.

`OTEL_EXPORTER_OTLP_ENDPOINT` turns them on. Until then no OpenTelemetry is imported, and a span is `NOTHING`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from flowpp.logs import about

if TYPE_CHECKING:
    from flowpp.otlp import Sender

PARENT = "TRACEPARENT"
"""Variable by which a process is told the span that it works for, as W3C Trace Context writes it."""

INSTALL = ".venv/bin/python -m pip install -e '.[tracing]'"

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"

Kind = Literal["internal", "server", "consumer"]
Attributes = Mapping[str, str | int | float]


class TracingError(ValueError):
    """Traces are wanted and cannot be sent; the message is a sentence that names what to change."""


class Span:
    """Work of which nothing is told, for traces are not wanted or it is not to be seen in them."""

    traceparent = ""
    """What work for it in another process names as its parent (W3C Trace Context)."""

    def note(self, attributes: Attributes) -> None:
        """Adds attributes, which must hold nothing secret."""

    def rename(self, name: str) -> None:
        """Where its name is known only later."""

    def end(self, *, failed: bool = False) -> None:
        """Once."""

    def current(self) -> AbstractContextManager[object]:
        """Within the block, spans that name no parent belong to it."""
        return nullcontext()


NOTHING = Span()

_sender: "Sender | None" = None


def configured() -> bool:
    """Whether the environment says where traces are to be sent."""
    return _first(_ENDPOINTS) is not None and os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"


def check() -> None:
    """Raises `TracingError` where traces are configured and cannot be sent."""
    found = _first(_ENDPOINTS)
    if found is None or not configured():
        return
    variable, endpoint = found
    if not endpoint.startswith(("http://", "https://")):
        raise TracingError(f"{variable} is no URL of a collector, as http://127.0.0.1:4318 is one")
    name, protocol = _first(_PROTOCOLS) or ("", _PROTOCOL)
    if protocol != _PROTOCOL:
        advised = "leave it out, and name the port at which the collector takes HTTP, as a rule 4318"
        raise TracingError(f"{name} is {protocol}, but traces are sent as {_PROTOCOL} alone: {advised}")
    try:
        import flowpp.otlp  # noqa: F401
    except ImportError as error:
        raise TracingError(f"{variable} is set, but traces need packages that are not there: {INSTALL}") from error


@contextmanager
def sending(service: str) -> Iterator[None]:
    """Sends what ends within the block, where that is configured, as of `service` where OTEL_SERVICE_NAME is not set.

    Its end takes 2 seconds at most. Raises `TracingError`.
    """
    global _sender
    if not configured():
        yield
        return
    check()
    from flowpp.otlp import Sender

    try:
        before, _sender = _sender, Sender(service)
    except ValueError as error:
        raise TracingError(f"OpenTelemetry's variables (OTEL_...) do not fit: {error}") from error
    try:
        yield
    finally:
        ended, _sender = _sender, before
        ended.close()


def wanted() -> bool:
    """Whether spans are being sent: else their attributes need not be put together."""
    return _sender is not None


def begin(
    name: str,
    kind: Kind = "internal",
    *,
    parent: str = "",
    links: Sequence[str] = (),
    attributes: Attributes | None = None,
) -> Span:
    """A span that somebody ends. Without a `parent` it belongs to the current one; `links` are other spans' names.

    Both are written as `Span.traceparent`.
    """
    return NOTHING if _sender is None else _sender.begin(name, kind, parent, links, attributes or {})


@contextmanager
def span(
    name: str, *, parent: str = "", links: Sequence[str] = (), attributes: Attributes | None = None
) -> Iterator[Span]:
    """The block's span, as `begin` makes it; log lines within name its trace. It has failed where the block raises."""
    begun = begin(name, parent=parent, links=links, attributes=attributes)
    failed = True
    try:
        with begun.current(), about(trace_id=trace_id(begun.traceparent)):
            yield begun
        failed = False
    finally:
        begun.end(failed=failed)


def trace_id(traceparent: str) -> str:
    """32 hexadecimal digits; empty where there is none."""
    return traceparent.split("-")[1] if traceparent else ""


def _first(variables: Sequence[str]) -> tuple[str, str] | None:
    """The first of them that says anything, and what it says."""
    return next(((name, os.environ[name]) for name in variables if os.environ.get(name)), None)
