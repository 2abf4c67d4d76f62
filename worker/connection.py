"""The connection to Redis."""

from typing import Any

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, OutOfMemoryError, TimeoutError
from redis.retry import Retry

UNREACHABLE = (ConnectionError, TimeoutError, BusyLoadingError, OutOfMemoryError)
"""What the commands raise while the server is away, loads its data, or has reached its `maxmemory`."""


def connect(url: str, retries: int = 3) -> Redis:
    """A pool of connections, for threads; a command is tried again `retries` times, at most a second apart."""
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=30,  # longer than any command takes, and the stop of a blocking one
        socket_connect_timeout=5,
        health_check_interval=30,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1), retries),
        retry_on_error=list(UNREACHABLE),
    )


def redis_time(redis: Any) -> float:
    """The server's clock, in Unix seconds."""
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1e6)
