"""The connection to Redis, and which of its replies mean that it serves nobody for now."""

import re
import socket
from typing import Any

from redis import Redis
from redis.asyncio.connection import DefaultParser as AsyncParser
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.commands.core import Script as RegisteredScript
from redis.connection import DefaultParser as Parser
from redis.exceptions import ConnectionError, NoScriptError, ResponseError, TimeoutError
from redis.retry import Retry

STATES = {
    "ASK": "it moves its keys to another server",
    "BUSY": "it runs a script that takes long",
    "CLUSTERDOWN": "its cluster is incomplete",
    "CROSSSLOT": "it is part of a cluster, which this service cannot use",
    "DENIED": "it is in protected mode",
    "LOADING": "it loads its data",
    "MASTERDOWN": "it is a replica without its primary",
    "MISCONF": "it cannot write to its disk",
    "MOVED": "another server of its cluster has the keys",
    "NOREPLICAS": "it has too few replicas",
    "OOM": "its memory is full",
    "READONLY": "it is a replica",
    "TRYAGAIN": "its cluster moves keys",
    "UNBLOCKED": "it has just become a replica",
}
"""Replies of Redis and Valkey about the server's state, by their first word, and what each means.

The list ends where waiting does not help: NOPERM, WRONGTYPE and others are faults of a configuration or of a program.
NOSCRIPT is no state, as `Script` then sends the script. NOAUTH and WRONGPASS raise redis-py's `AuthenticationError`,
which is a `ConnectionError`: a password is changed on the server first, and then here.
"""

_WITHOUT_WORD = {
    "max number of clients": "it has as many connections as it may have",
    "while the cluster is down": STATES["CLUSTERDOWN"],
    "a non local key in a cluster node": STATES["MOVED"],
    "do not hash to the same slot": STATES["CROSSSLOT"],
    "Script killed by user": "somebody ended the script",
}
"""Parts of replies that begin with ERR, and what each means."""

# A reply inside another one: of EXEC, and of a script before Redis 7.
_INSIDE = re.compile(r"EXECABORT Transaction discarded because of: -?|ERR Error running script .*?: -")


class ServerState(ResponseError):
    """Redis answered that its state forbids the command for now, and did not execute it."""

    def __init__(self, reply: str, meaning: str) -> None:
        super().__init__(reply)
        self.meaning = meaning


UNREACHABLE = (ConnectionError, TimeoutError, ServerState)
"""Exceptions of commands while the server cannot be reached, or while its state forbids them."""


def state_of(reply: str) -> str | None:
    """The meaning of an error reply about the server's state, or None if it is about something else."""
    inner = _INSIDE.match(reply)
    word = reply[inner.end() if inner else 0 :].partition(" ")[0]
    if word in STATES:
        return STATES[word]
    if reply.startswith("ERR "):
        return next((meaning for part, meaning in _WITHOUT_WORD.items() if part in reply), None)
    return None


class StateParser(Parser):  # type: ignore[misc, valid-type]
    """A parser of replies that raises `ServerState`."""

    @classmethod
    def parse_error(cls, response: str) -> Exception:
        meaning = state_of(response)
        return super().parse_error(response) if meaning is None else ServerState(response, meaning)


class AsyncStateParser(AsyncParser):  # type: ignore[misc, valid-type]
    """The same for redis.asyncio."""

    parse_error = StateParser.parse_error


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
        parser_class=StateParser,
        socket_timeout=30,  # longer than any command takes, and the stop of a blocking one
        socket_connect_timeout=5,
        health_check_interval=30,
        **KEEPALIVE,
        # each time on a new connection: after a failover a name leads to another server
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1), retries),
        retry_on_error=list(UNREACHABLE),
    )


def options_in_a_loop() -> dict[str, Any]:
    """Of a client of redis.asyncio; a command is tried again three times, at most a second apart."""
    # uvloop says RuntimeError of a connection that was found broken while nobody used it
    errors: Any = (*UNREACHABLE, RuntimeError)
    retry = AsyncRetry(ExponentialWithJitterBackoff(base=0.05, cap=1), 3, supported_errors=errors)
    return {
        "decode_responses": True,
        "parser_class": AsyncStateParser,
        "socket_timeout": 30,
        "retry": retry,
        **KEEPALIVE,
    }


class Script(RegisteredScript):
    """A Lua script, which is sent whole if the server does not know it.

    redis-py would load it and call it by its hash again: between the two the server may be replaced once more.
    """

    def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        server: Any = client or self.registered_client
        keys, args = keys or (), args or ()
        try:
            return server.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return server.eval(self.script, len(keys), *keys, *args)


def check_writes(redis: Any) -> None:
    """Raises what any command that writes would: a server may read and not write."""
    redis.set("flowpp:ready", "1", ex=60)


def redis_time(redis: Any) -> float:
    """The server's clock, in Unix seconds."""
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1e6)
