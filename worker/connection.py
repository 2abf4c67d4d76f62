"""The connection to Redis."""

import socket
from typing import Any

from redis import Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, OutOfMemoryError, TimeoutError
from redis.retry import Retry

UNREACHABLE = (ConnectionError, TimeoutError, BusyLoadingError, OutOfMemoryError)
"""What the commands raise while the server is away, loads its data, or has reached its `maxmemory`."""

_SILENCE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""Seconds, but the last, which is milliseconds."""

KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        getattr(socket, name): value for name, value in _SILENCE.items() if hasattr(socket, name)
    },
}
"""A connection whose server is gone without a word is found broken after 20 s: each of a pool would wait otherwise."""


def connect(url: str, retries: int = 3) -> Redis:
    """A pool of connections, for threads; a command is tried again `retries` times, at most a second apart."""
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=30,  # longer than any command takes, and the stop of a blocking one
        socket_connect_timeout=5,
        health_check_interval=30,
        **KEEPALIVE,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1), retries),
        retry_on_error=list(UNREACHABLE),
    )


def options_in_a_loop() -> dict[str, Any]:
    """Of a client of redis.asyncio; a command is tried again three times, at most a second apart."""
    # uvloop says RuntimeError of a connection that was found broken while nobody used it
    errors: Any = (ConnectionError, TimeoutError, RuntimeError)
    retry = AsyncRetry(ExponentialWithJitterBackoff(base=0.05, cap=1), 3, supported_errors=errors)
    return {"decode_responses": True, "socket_timeout": 30, "retry": retry, **KEEPALIVE}


def redis_time(redis: Any) -> float:
    """The server's clock, in Unix seconds."""
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1e6)
