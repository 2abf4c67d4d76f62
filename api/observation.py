"""What is noted of each request: its id, and how long it took until its answer began, by route, method and status.

That time is also the request's span: an event stream would end with its job, a download with the network.
"""

import re
import secrets
from time import perf_counter

from prometheus_client import Histogram
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.queries import PREFIX
from api.redaction import redacted
from flowpp.logs import about
from flowpp.tracing import NOTHING, Span, begin, trace_id, wanted
from worker.metrics import histogram

REQUESTS = histogram(
    "flowpp_request_duration_seconds",
    ["method", "route", "status"],
    "Requests, from their arrival to the beginning of the answer. Its _count is the number of requests. `route` is the "
    "path with the names of its parameters, or none.",
    "api",
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
)

NO_ROUTE = "none"
REQUEST_ID = "X-Request-ID"
"""Header, of a request by the caller's choice and of each answer: log lines of the request, and of the jobs that it
creates, name it."""

_HEADER = REQUEST_ID.lower().encode()
_ID = re.compile(rb"[0-9A-Za-z._-]{1,128}")
_TRACEPARENT = b"traceparent"
_UNTRACED = frozenset({"/healthz", "/metrics", "/readyz"})  # asked every few seconds, by programs
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Observation:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._series: dict[tuple[str, str, int], Histogram] = {}  # looking labels up takes longer than observing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = perf_counter()
        answered = False
        request_id = _id_of(scope)
        span = _span(scope, request_id)
        scope.setdefault("state", {}).update(request_id=request_id, traceparent=span.traceparent)

        async def send_observed(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._observe(scope, message["status"], arrived)
                _end(span, scope, message["status"])
                message["headers"] = [*message["headers"], (_HEADER, request_id.encode())]
            await send(message)

        try:
            with about(request_id=request_id, trace_id=trace_id(span.traceparent)):
                await self._app(scope, receive, send_observed)
        finally:
            if not answered:  # by Starlette, around us: an exception that nobody handles
                self._observe(scope, 500, arrived)
                _end(span, scope, 500)

    def _observe(self, scope: Scope, status: int, arrived: float) -> None:
        key = scope["method"], template(scope), status
        series = self._series.get(key)
        if series is None:
            method = key[0] if key[0] in _METHODS else "other"
            series = self._series[key] = REQUESTS.labels(method, key[1], status)
        series.observe(perf_counter() - arrived)


def _id_of(scope: Scope) -> str:
    """The caller's, where it is one, and no key that was sent by mistake; else a new one."""
    for name, value in scope["headers"]:
        if name == _HEADER and _ID.fullmatch(value):
            given = str(value.decode())
            return given if redacted(given) == given else secrets.token_hex(8)
    return secrets.token_hex(8)


def request_id_of(request: Request) -> str:
    """As `Observation` has noted it."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def traceparent_of(request: Request) -> str:
    """Of the request's span, as `Observation` has begun it."""
    return str(request.scope.get("state", {}).get("traceparent", ""))


def template(scope: Scope) -> str:
    """The path of the route that answers, with the names of its parameters: there are few of them."""
    path = getattr(scope.get("route"), "path_format", None)
    if path is None:
        return NO_ROUTE
    if scope["path"].startswith(f"{PREFIX}/") and not path.startswith(PREFIX):  # a route does not know its prefix
        return PREFIX + str(path)
    return str(path)


def _span(scope: Scope, request_id: str) -> Span:
    """Belongs to the caller's, where that names one. Queries and headers are nobody's business."""
    if not wanted() or scope["path"] in _UNTRACED:
        return NOTHING
    parent = next((value.decode("latin-1") for name, value in scope["headers"] if name == _TRACEPARENT), "")
    method = _method(scope)
    attributes = {
        "http.request.method": "_OTHER" if method == "HTTP" else method,
        "url.path": redacted(scope["path"]),
        "flowpp.request_id": request_id,
    }
    return begin(method, "server", parent=parent, attributes=attributes)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "HTTP"


def _end(span: Span, scope: Scope, status: int) -> None:
    if span is NOTHING:
        return
    route = template(scope)
    if route != NO_ROUTE:
        span.note({"http.route": route})
        span.rename(f"{_method(scope)} {route}")
    span.note({"http.response.status_code": status})
    if status >= 500:
        span.note({"error.type": str(status)})
    span.end(failed=status >= 500)
