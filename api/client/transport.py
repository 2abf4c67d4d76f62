"""Requests to the service, sent again where that is safe, and checked answers back."""

import os
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from api.client.calls import Resource, W, Way
from api.client.errors import ClientError, ProblemError, Unreachable, problem_of
from api.client.objects import Page

LOCAL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 10
MAX_PAUSE_SECONDS = 60
"""Longer than this nobody wants to wait unasked: a service that says so is not asked again."""
UNDER_WAY_RETRIES = 12
"""Over a minute and more: so long the service minds a request whose process was lost."""
_BUSY = frozenset({429, 503})
_UNDER_WAY = "idempotency_in_progress"
"""Code of the answer while the same request, of which we heard no more, is still at work."""

R = TypeVar("R", bound=BaseModel)


class Transport:
    """Requests in, checked answers out; raises as api.client.errors tells.

    `max_retries` times a request is sent again: after 429 and 503, honouring Retry-After, and after a broken
    connection where it does the same when it arrives twice. `timeout`: seconds without a byte from the service.
    `on_wait` is called with the seconds that the service asks to wait, before each such wait.
    """

    def __init__(
        self,
        way: Way,
        url: str | None,
        key: str | None,
        timeout: float,
        max_retries: int,
        on_wait: Callable[[float], None] | None,
    ) -> None:
        self.way = way
        self.max_retries = max_retries
        self.timeout = timeout
        self.on_wait = on_wait
        self._http = httpx.AsyncClient(
            base_url=_checked_url(url or os.environ.get("FLOWPP_URL") or LOCAL),
            headers=_authorization(key or os.environ.get("FLOWPP_API_KEY") or ""),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            transport=way.http(),
            trust_env=False,  # a proxy of the environment has no business between us and a local service
        )

    @property
    def url(self) -> str:
        return str(self._http.base_url).rstrip("/")

    async def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async with self.stream(method, path, **kwargs) as response:
            await response.aread()
        return response

    @asynccontextmanager
    async def stream(self, method: str, path: str, **kwargs: Any) -> AsyncIterator[httpx.Response]:
        """The successful response, its body still to be read: where that breaks off, `Unreachable` is raised, too."""
        try:
            response = await self._sent(method, path, **kwargs)
            try:
                yield response
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            raise Unreachable(self.url, str(error) or type(error).__name__) from error

    async def ask(self, path: str) -> httpx.Response:
        """Whatever is answered, once: also a refusal."""
        try:
            return await self._http.get(path)
        except httpx.TransportError as error:
            raise Unreachable(self.url, str(error) or type(error).__name__) from error

    async def get(self, kind: type[R], path: str) -> R:
        return parsed(kind, await self.request("GET", path))

    async def post(self, kind: type[R], path: str) -> R:
        return parsed(kind, await self.request("POST", path))

    async def create(
        self, kind: type[R], path: str, *, headers: Mapping[str, str] | None = None, timeout: float = 0, **body: Any
    ) -> R:
        """A POST that creates, once, however often it is sent. `timeout`: more seconds than others have."""
        headers = {"Idempotency-Key": uuid.uuid4().hex, **(headers or {})}
        limits = httpx.Timeout(self.timeout + timeout, connect=CONNECT_SECONDS)
        return parsed(kind, await self.request("POST", path, headers=headers, timeout=limits, **body))

    async def pages(self, kind: type[R], path: str, query: Mapping[str, Any]) -> AsyncGenerator[R, None]:
        """Every object of a list, page after page."""
        params = {name: value for name, value in query.items() if value is not None}
        while True:
            page = parsed(Page[kind], await self.request("GET", path, params=params))  # type: ignore[valid-type]
            for each in page.data:
                yield each
            if not page.has_more:
                return
            params["after"] = page.last_id

    async def all(self, kind: type[R], path: str) -> tuple[R, ...]:
        """Every object of a short list."""
        return tuple([found async for found in self.pages(kind, path, {})])

    async def close(self) -> None:
        await self._http.aclose()

    async def _sent(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        repeatable = method != "POST" or "Idempotency-Key" in kwargs.get("headers", {})
        retries = Retries(self.max_retries)
        at_work = Retries(UNDER_WAY_RETRIES if self.max_retries else 0)
        while True:
            _rewind(kwargs.get("files") or ())
            request = self._http.build_request(method, path, **kwargs)
            try:
                response = await self._http.send(request, stream=True)
            except httpx.TransportError as error:
                # where no connection came about, nothing arrived
                if not repeatable and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    raise
                pause = retries.pause()
                if pause is None:
                    raise
            else:
                if response.is_success:
                    return response
                problem = await _problem(response)
                pause = None
                if problem.status in _BUSY:
                    asked = seconds_of(response.headers.get("Retry-After"))
                    pause = retries.pause(asked)
                    if asked and pause is not None and self.on_wait is not None:
                        self.on_wait(asked)
                elif problem.code == _UNDER_WAY:
                    pause = at_work.pause()
                if pause is None:
                    raise problem
            await self.way.sleep(pause)


class Part(Resource[W]):
    """A part of the service: calls that go through its transport."""

    def __init__(self, way: W, transport: Transport) -> None:
        self.way = way
        self._transport = transport


def path_of(*parts: str) -> str:
    """Whatever an id holds, it leads nowhere else."""
    return "/".join(["/v1", *(quote(part, safe="") for part in parts)])


@dataclass
class Retries:
    """How often, and when, a request may be sent again."""

    left: int
    made: int = 0

    def pause(self, asked: float = 0) -> float | None:
        """Seconds until the next try, where the service asks to wait `asked`; none: it is not to be tried again."""
        if not self.left or asked > MAX_PAUSE_SECONDS:
            return None
        backoff = min(8, 0.5 * 2**self.made)
        self.left -= 1
        self.made += 1
        # never sooner than asked, and not all who were sent away at once
        return max(asked, backoff / 2) + random.uniform(0, backoff / 2)


def seconds_of(retry_after: str | None) -> float:
    """From now, of a Retry-After in seconds or as an HTTP-date; 0 for what is neither."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, when.timestamp() - time.time())


def parsed(kind: type[R], response: httpx.Response) -> R:
    """Raises `ClientError` for what our service does not answer."""
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        asked = f"{response.request.method} {response.request.url}"
        raise ClientError(f"what answers {asked} is no flowpp service, or one of another version: {error}") from error


async def _problem(response: httpx.Response) -> ProblemError:
    try:
        await response.aread()
    except httpx.TransportError:  # its status we have
        return ProblemError(response.status_code, "http_error", response.reason_phrase)
    finally:
        await response.aclose()
    return problem_of(response)


def _rewind(files: Any) -> None:
    for _, (_, body) in files.items() if isinstance(files, dict) else files:
        if not isinstance(body, bytes):
            body.seek(0)


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{_source('FLOWPP_URL', url)}{url!r} is no url: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{_source('FLOWPP_URL', url)}{url!r} is no url of a service; they look like {LOCAL}")
    return url


def _authorization(key: str) -> dict[str, str]:
    if not key:
        return {}
    if not (key.isascii() and key.isprintable() and " " not in key):
        source = _source("FLOWPP_API_KEY", key)
        raise ValueError(f"{source}the key is none: it has spaces, line ends or characters beyond ASCII")
    return {"Authorization": f"Bearer {key}"}


def _source(variable: str, value: str) -> str:
    """The variable's name, if it holds the value; the command line reads it, too."""
    return f"{variable}: " if os.environ.get(variable) == value else ""
