"""What arrives: bodies in bounded time, size and number. What leaves: headers that keep browsers from running it."""

import asyncio
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**16
"""Of bodies that hold no files."""

LARGE_BYTES = 2**20
"""Forms of more are kept on disk while they arrive."""

SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 30, 10_000
"""A body may keep us waiting so long, and a second longer for so many bytes that have come."""

_AGAIN_SECONDS = 5


class Intake:
    """ASGI middleware: raises `HTTPException` if a body is read that is encoded, too large, too slow, or one too many.

    At most `max_large` forms of more than `LARGE_BYTES` are taken at once.
    """

    def __init__(self, app: ASGIApp, max_large: int) -> None:
        self._app = app
        self._max_large = max_large
        self._large = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        ends_line = False

        async def send_safe(message: Message) -> None:
            nonlocal ends_line
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                _protect(headers, scope["path"])
                ends_line = _is_document(headers)
                if ends_line:
                    headers["Content-Length"] = str(int(headers["Content-Length"]) + 1)
            elif ends_line and not message.get("more_body"):  # or the prompt of who asks with curl stands behind it
                message["body"] += b"\n"
            await send(message)

        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send_safe)
            return
        body = _Body(self, scope, receive)
        try:
            await self._app(scope, body, send_safe)
        finally:
            self._large -= body.is_large

    def take_large(self) -> None:
        """Raises `HTTPException` where there are as many as can be."""
        if self._large >= self._max_large:
            headers = {"Retry-After": str(_AGAIN_SECONDS), "Connection": "close"}
            raise HTTPException(503, f"{self._max_large} large uploads are under way; try again in a while", headers)
        self._large += 1


class _Body:
    """A request's `receive`, which watches over its body."""

    def __init__(self, intake: Intake, scope: Scope, receive: Receive) -> None:
        self._intake, self._scope, self._receive = intake, scope, receive
        headers = Headers(scope=scope)
        codings = ",".join(headers.getlist("content-encoding") + headers.getlist("transfer-encoding"))
        self._codings = {coding.strip().lower() for coding in codings.split(",")} - {"", "identity", "chunked"}
        self._is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        declared = headers.get("content-length", "")
        self._declared = int(declared) if declared.isdecimal() else 0
        self._arrived = 0
        self._waited = 0.0
        self._ended = False
        self.is_large = False

    async def __call__(self) -> Message:
        if self._ended:
            return await self._receive()  # word of a disconnect, which may come whenever it wants
        self._check_coding()
        self._check_size(max(self._declared, self._arrived))
        message = await self._next()
        self._arrived += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        self._check_size(self._arrived)
        return message

    async def _next(self) -> Message:
        start = time.monotonic()
        try:
            async with asyncio.timeout(SLOW_SECONDS + self._arrived / SLOW_BYTES_PER_SECOND - self._waited):
                message = await self._receive()
        except TimeoutError as error:
            detail = f"the body came too slowly: {self._arrived:,} bytes of it, and then no more in time"
            raise HTTPException(408, detail, {"Connection": "close"}) from error
        self._waited += time.monotonic() - start
        return message

    def _check_coding(self) -> None:
        """Raises `HTTPException` for a compressed body: unpacked, it could have any size."""
        if self._codings:
            detail = f"the body is encoded as {', '.join(sorted(self._codings)):.100}; send it without Content-Encoding"
            raise HTTPException(415, detail, {"Accept-Encoding": "identity", "Connection": "close"})

    def _check_size(self, size: int) -> None:
        if not (self._is_form and self._takes_forms()):
            if size > MAX_BODY_BYTES:
                detail = f"the body is larger than the limit of {MAX_BODY_BYTES:,} bytes"
                raise HTTPException(413, detail, {"Connection": "close"})
        elif size > LARGE_BYTES and not self.is_large:
            self._intake.take_large()
            self.is_large = True

    def _takes_forms(self) -> bool:
        """Whether the route, which is known when the body is read, says that it takes forms."""
        body = (getattr(self._scope.get("route"), "openapi_extra", None) or {}).get("requestBody", {})
        return "multipart/form-data" in body.get("content", {})


def _is_document(headers: Headers) -> bool:
    """Whether it is JSON that was written for this answer: no file, which has an ETag."""
    media_type = headers.get("content-type", "")
    is_json = media_type.startswith(("application/json", "application/problem+json"))
    return is_json and "content-length" in headers and "etag" not in headers


def _protect(headers: MutableHeaders, path: str) -> None:
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    if path.startswith("/v1/"):  # a page that a job or a user has left runs nothing, and knows nothing of this origin
        headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'; sandbox"
    else:
        headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")  # the dashboard has a stricter one
