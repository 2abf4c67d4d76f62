"""The local stack: Redis server, API, training worker and inference worker as children of this process.

Everything lives under one data directory: redis/ (records and queue), store/ (artifacts), logs/. A lock keeps a
second stack out of it; the children hold it too, so that it is free only when the last of them is gone.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NoReturn, Self

import httpx

from flowpp.durable import replace_file
from flowpp.environment import clean
from worker import child
from worker.redis_server import HOST, RedisServer, RedisServerError, free_port

START_SECONDS = 300  # longer than cold imports of torch take on a slow disk and a busy core
REDIS_URL = "redis.url"
"""File in the data directory: where the embedded Redis server is while the stack runs."""

GRACE_SECONDS = 20  # longer than a training step and its checkpoint take on a small machine
REPEAT_SECONDS = 0.05  # from a signal whose exception was ignored to its repetition
LOCK_SECONDS = 2  # longer than the children of a killed stack take to be gone


class StackError(RuntimeError):
    """The stack cannot run; the message says why and ends with the tail of the log, if there is one."""


class Stack:
    """The service on http://127.0.0.1:`port` over `data`; port 0 takes a free one. A context manager.

    `FLOWPP_REDIS_URL`, where set, names the Redis server to use instead of the embedded one. However this
    process ends, its children end too (on Linux; elsewhere they survive a SIGKILL of it).
    """

    def __init__(self, data: Path, port: int = 8000) -> None:
        self.data = data.absolute()
        self.port = port
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self._cleanup = ExitStack()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    def start(self) -> Self:
        """Returns when the service is ready. Raises `StackError`, with everything stopped."""
        with ExitStack() as cleanup:
            self.port = self.port or free_port()
            _require_free(self.port)
            self.logs.mkdir(parents=True, exist_ok=True)
            held = cleanup.enter_context(lock(self.data))
            environment = self._environment(cleanup, held)
            cleanup.callback(self._stop_children)
            for name, command in self._commands().items():
                command, own = [sys.executable, "-m", *command], environment | _metrics_port(name)
                self.children[name] = child.start(command, self._log(name), own, pass_fds=[held.fileno()])
            self._wait_until_ready()
            self._cleanup = cleanup.pop_all()
        return self

    def stop(self) -> None:
        """API and workers, then Redis: SIGTERM, and SIGKILL after a grace period or upon an interrupt."""
        self._cleanup.close()

    def check(self) -> None:
        """Raises `StackError` if a child has ended."""
        for name, process in self.children.items():
            if process.poll() is not None:
                raise StackError(self._obituary(name, process.returncode))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """While the block runs, the end of a child raises `StackError` in the main thread. Main thread only."""

        def check(number: int, frame: FrameType | None) -> None:
            self.check()

        before = signal.signal(signal.SIGCHLD, check)
        try:
            self.check()  # one may have ended before the handler was there
            yield
        finally:
            signal.signal(signal.SIGCHLD, before)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _commands(self) -> dict[str, list[str]]:
        listen = ["--host", HOST, "--port", str(self.port)]
        return {
            "api": [
                "uvicorn",
                "api.app:create_app",
                "--factory",
                *(
                    "--app-dir",
                    str(Path(__file__).parents[1]),
                ),  # uvicorn would prefer a folder `api` of the current directory
                *listen,
                "--timeout-graceful-shutdown",
                "3",
                "--no-server-header",
            ],
            "training": ["worker", "training"],
            "inference": ["worker", "inference"],
        }

    def _environment(self, cleanup: ExitStack, held: IO[str]) -> dict[str, str]:
        environment = {"FLOWPP_STORE": str(self.data / "store"), **clean(os.environ), "PYTHONUNBUFFERED": "1"}
        environment["FLOWPP_DATA_DIRECTORY"] = str(self.data)
        environment.setdefault("FLOWPP_AUTHENTICATION", "false")  # it listens on loopback only
        if "FLOWPP_REDIS_URL" not in os.environ:
            server = RedisServer(self.data / "redis", log=self._log("redis"), pass_fds=[held.fileno()])
            try:
                cleanup.enter_context(server)
            except RedisServerError as error:
                raise StackError(str(error)) from error
            assert server.process is not None
            self.children["redis"] = server.process
            environment["FLOWPP_REDIS_URL"] = server.url
            where = self.data / REDIS_URL
            replace_file(where, server.url.encode())
            cleanup.callback(where.unlink, missing_ok=True)
        return environment

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _obituary(self, name: str, status: int) -> str:
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the {name} process {ended}; the end of {self._log(name)}:\n{child.tail(self._log(name))}"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        answer = "nothing"
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    response = client.get("/readyz")
                except httpx.TransportError as error:  # not yet listening
                    answer = str(error)
                else:
                    if response.is_success:
                        return
                    answer = _missing(response)
                time.sleep(0.1)
        raise StackError(f"the service is not ready after {START_SECONDS} s; {self.url}/readyz answers: {answer}")

    def _stop_children(self) -> None:
        processes = [self.children[name] for name in self._commands() if name in self.children]
        try:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                child.stop(process, GRACE_SECONDS)
        finally:  # an interrupt while we wait: at once, then
            for process in processes:
                child.sweep(process)
                process.wait()
            self.children.clear()


def _missing(response: httpx.Response) -> str:
    """Sentences of /readyz about a service that is not ready."""
    try:
        return "; ".join(response.json()["missing"])
    except (ValueError, KeyError):
        return response.text


def _metrics_port(name: str) -> dict[str, str]:
    """The training worker has the one that is set, inference the next; the API answers /metrics on its own port."""
    port = os.environ.get("FLOWPP_METRICS_PORT", "")
    if not port.isdecimal() or int(port) == 0:
        return {}
    return {"FLOWPP_METRICS_PORT": {"training": port, "inference": str(int(port) + 1)}.get(name, "0")}


def lock(data: Path) -> IO[str]:
    """Makes a data directory ours until the file is closed here and in every child that inherits it.

    Raises `StackError` if another stack has it.
    """
    data.mkdir(parents=True, exist_ok=True)
    file = (data / "lock").open("a+")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            if time.monotonic() > deadline:
                file.close()
                raise StackError(
                    f"another stack (process {owner}) uses {data}. Stop it, or choose another directory by --data."
                ) from None
            time.sleep(0.05)
        else:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file


def exit_on_signals() -> None:
    """Makes Ctrl-C, SIGTERM and a closed terminal end this process by `SystemExit`, so that every `finally` runs."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    def repeat(ignored: "sys.UnraisableHookArgs") -> None:
        # Python ignores exceptions in callbacks of fork and in __del__; without this the signal would be lost there.
        code = ignored.exc_value.code if isinstance(ignored.exc_value, SystemExit) else None
        if not isinstance(code, int) or code <= 128:
            sys.__unraisablehook__(ignored)
            return
        signal.signal(signal.SIGALRM, lambda number, frame: leave(code - 128, frame))
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    sys.unraisablehook = repeat


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"port {port} of {HOST} cannot be used: {error.strerror}"
            raise StackError(f"{reason}. Choose another by --port; 0 chooses a free one.") from error
