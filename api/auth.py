"""Who asks: a key from `Authorization: Bearer`, what it may do, and how often.

Authentication is off only where the settings say so, and then only connections over loopback are answered, for pages
of other sites neither.
"""

import ipaddress
import logging
import math
import time
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import ConnectionPool, Redis
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem, unreachable
from worker.connection import UNREACHABLE
from worker.keys import Caller, caller_of, id_of, record_key
from worker.keys import Scope as KeyScope
from worker.settings import Settings

log = logging.getLogger(__name__)

PROTECTED = "/v1/"
METRICS = "/metrics"
"""It tells of everybody's jobs."""

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class Refused(Exception):
    """Who asks is not let in."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers or {}


class Identification:
    """ASGI middleware before /metrics and all of /v1: puts the `Caller` into the state, or answers 401, 403 or 429."""

    def __init__(self, app: ASGIApp, settings: Settings, connections: ConnectionPool) -> None:
        self._app = app
        self._authentication = settings.authentication
        self._default_rate = settings.requests_per_minute
        self._redis: Any = Redis(connection_pool=connections)
        pool: Any = connections  # its annotations know of strings and numbers only
        storage = RedisStorage(
            f"async+{settings.redis_url}",
            implementation="redispy",
            key_prefix="flowpp:limits",
            wrap_exceptions=False,
            connection_pool=pool,
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        if not self._authentication:
            log.warning("authentication is off: who can reach this machine's loopback can do everything")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith((PROTECTED, METRICS)):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        counted: dict[str, str] = {}

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(counted)
            await send(message)

        try:
            if self._authentication:
                caller = await self._identify(request.headers)
                counted |= await self._count(caller)
                _check_scope(caller, request)
            else:
                _check_local(scope, request.headers)
                caller = Caller()
        except Refused as error:
            response = problem(request, error.status, error.code, error.detail, headers=error.headers)
            await response(scope, receive, send_counted)
            return
        except UNREACHABLE as error:
            await (await unreachable(request, error))(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send_counted)

    async def _identify(self, headers: Headers) -> Caller:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        challenge = {"WWW-Authenticate": 'Bearer realm="flowpp"'}
        if scheme.lower() != "bearer" or not token:
            detail = "send a key as 'Authorization: Bearer flowpp_...'; `flowpp keys create` makes one"
            raise Refused(401, "unauthenticated", detail, challenge)
        token = token.strip()
        key_id = id_of(token)
        record = await self._redis.get(record_key(key_id)) if key_id else None
        caller = caller_of(token, record)
        if caller is None:
            challenge["WWW-Authenticate"] += ', error="invalid_token"'
            raise Refused(401, "unauthenticated", "there is no such key, or it was revoked", challenge)
        return caller

    async def _count(self, caller: Caller) -> dict[str, str]:
        """The RateLimit headers (draft-ietf-httpapi-ratelimit-headers). Raises `Refused` beyond the limit."""
        most = caller.quota.requests_per_minute or self._default_rate
        limit = RateLimitItemPerMinute(most)
        admitted = await self._limiter.hit(limit, caller.key or "")
        reset, remaining = await self._limiter.get_window_stats(limit, caller.key or "")
        seconds = max(1, math.ceil(reset - time.time()))
        headers = {
            "RateLimit-Policy": f'"requests";q={most};w=60',
            "RateLimit": f'"requests";r={remaining};t={seconds}',
        }
        if not admitted:
            detail = f"this key may send {most:,} requests a minute; try again in {seconds} s"
            raise Refused(429, "rate_limited", detail, headers | {"Retry-After": str(seconds)})
        return headers


def _check_scope(caller: Caller, request: Request) -> None:
    what: str = request.method
    wanted: KeyScope = "read" if what in ("GET", "HEAD", "OPTIONS") else "submit"
    if request.scope["path"].startswith(METRICS):
        what, wanted = METRICS, "admin"
    if not caller.may(wanted):
        raise Refused(403, "scope_missing", f"this key lacks the scope {wanted!r}, which {what} needs")


def _check_local(scope: Scope, headers: Headers) -> None:
    """Raises `Refused` for what did not come over loopback, from this machine, and not from another site's page."""
    address = (scope.get("server") or ("",))[0]
    if not _is_loopback(address) or any(name in headers for name in _FORWARDED):
        detail = "without authentication only connections over loopback are answered; set FLOWPP_AUTHENTICATION=true"
        raise Refused(403, "not_loopback", detail)
    for name, prefix in (("host", "//"), ("origin", "")):  # DNS rebinding, and forms on pages of other sites
        sent = headers.get(name)
        if sent and not _is_loopback(_host_of(prefix + sent)):
            detail = f"without authentication only {name.title()} localhost is answered, not {sent!r:.80}"
            raise Refused(403, "not_loopback", detail)


def _host_of(url: str) -> str:
    """The host that `url` names; empty if it names none or cannot be parsed."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # a bracket without its pair, or a character that Unicode normalization turns into a separator
        return ""


@lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
