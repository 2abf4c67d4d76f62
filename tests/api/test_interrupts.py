"""Ctrl-C in each wait of the command: a sentence about the outcome, and exit code 130."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.api.busy_server import JOB
from worker.redis_server import free_port

STATUS = b'{"at": 0, "queues": {}, "jobs": {}, "training": []}'
NO_OBJECTS = b'{"data": [], "has_more": false, "last_id": null}'
GRID = b'{"name": "grid.png", "bytes": 9, "sha256": "", "url": ""}'
ARTIFACTS = b'{"data": [%s], "has_more": false, "last_id": "grid.png"}' % GRID


class Stalling:
    """A server that stops in the middle of what `stalls` names: `read` or `read all` a POST, or `send` a file."""

    def __init__(self, stalls: str) -> None:
        self.reached, self.go_on, self.asked = threading.Event(), threading.Event(), 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if "artifacts/" in self.path or self.path.endswith("/download"):
                    self._answer(b"12345", length=9)
                    outer.stall()
                elif self.path.startswith("/v1/status"):
                    self._answer(STATUS)
                elif self.path == "/v1/jobs/job_1":
                    self._answer(JOB)
                    outer.asked += 1
                    if outer.asked > 1:  # `jobs watch` begins to wait after the first answer
                        outer.reached.set()
                elif self.path.endswith("/events"):
                    self._answer(b": heartbeat\n\n", length=1_000, kind="text/event-stream")
                    outer.stall()
                elif self.path.endswith("/artifacts"):
                    self._answer(ARTIFACTS)
                else:
                    self._answer(NO_OBJECTS)

            def do_POST(self) -> None:
                if stalls == "read":
                    self.rfile.read(2**16)
                    outer.stall()
                    self.close_connection = True
                    return
                self.rfile.read(int(self.headers["Content-Length"]))
                if stalls == "read all":
                    outer.stall()
                    self.close_connection = True
                    return
                self._answer(JOB, status=202)

            def _answer(self, body: bytes, status: int = 200, length: int = 0, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stall(self) -> None:
        self.reached.set()
        self.go_on.wait()


@contextmanager
def stalling(stalls: str) -> Iterator[Stalling]:
    found = Stalling(stalls)
    thread = threading.Thread(target=found.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield found
    finally:
        found.go_on.set()
        found.server.shutdown()
        found.server.server_close()
        thread.join()


def interrupted(
    *arguments: str | Path, when: Callable[[subprocess.Popen[str]], None], signals: int = 1
) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command that gets SIGINT once `when` returns."""
    command = [sys.executable, "-c", "from api.cli import main; main()", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            when(process)
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "Traceback" not in err
    return process.returncode, out, err


def reached(server: Stalling) -> Callable[[subprocess.Popen[str]], None]:
    def wait(process: subprocess.Popen[str]) -> None:
        assert server.reached.wait(60)

    return wait


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than the buffers of two sockets hold."""
    path = tmp_path_factory.mktemp("large") / "images.npy"
    np.save(path, np.zeros((20_000, 32, 32, 3), np.uint8))
    return path


@pytest.mark.parametrize("command", ["train", "datasets upload", "checkpoints upload"])
def test_an_upload_that_is_stopped_midway_has_stored_nothing(command: str, large: Path) -> None:
    options = ["--preset", "cifar10"] if command != "datasets upload" else []
    with stalling("read") as server:
        code, out, err = interrupted(*command.split(), large, *options, "--url", server.url, when=reached(server))
    assert (code, out) == (130, "")
    assert "of 61,440,128 bytes were sent. The service has stored nothing, and no job waits." in err


def test_an_upload_that_is_stopped_after_its_last_byte_may_be_stored(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((20, 32, 32, 3), np.uint8))
    with stalling("read all") as server:
        train = ("train", tmp_path / "images.npy", "--preset", "tiny", "--url", server.url)
        code, out, err = interrupted(*train, when=reached(server))
    assert (code, out) == (130, "")
    assert "`flowpp datasets list --limit 1` shows the dataset if it was stored. No job waits." in err


@pytest.mark.parametrize(
    ("command", "kind"), [("sample job_1", "sampling"), ("train ds_1", "training"), ("likelihood job_1", "likelihood")]
)
def test_a_request_for_a_job_that_is_stopped_may_have_created_it(command: str, kind: str, tmp_path: Path) -> None:
    images = [tmp_path / "image.png"] if kind == "likelihood" else []
    (tmp_path / "image.png").write_bytes(b"the service reads it, not the command")
    with stalling("read all") as server:
        code, out, err = interrupted(*command.split(), *images, "--url", server.url, when=reached(server))
    assert (code, out) == (130, "")
    assert f"`flowpp jobs list --type {kind} --limit 1` shows it if it was created." in err


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("command", ["sample job_1", "jobs watch job_1", "jobs watch job_1 --json", "train ds_1"])
def test_a_job_goes_on_when_the_wait_for_it_is_stopped(command: str, signals: int, tmp_path: Path) -> None:
    with stalling("") as server:
        code, out, err = interrupted(*command.split(), "--url", server.url, when=reached(server), signals=signals)
    assert code == 130
    assert out.strip() in ("", "job_1")
    if signals == 1:
        assert "Job job_1 continues: `flowpp jobs watch job_1` follows it, `flowpp jobs cancel job_1` ends it." in err


def test_a_download_that_is_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    with stalling("send") as server:
        target = tmp_path / "model"
        download = ("checkpoints", "download", "ckpt_1", "--output", target, "--url", server.url)
        code, out, err = interrupted(*download, when=reached(server))
        assert (code, out, target.exists()) == (130, "", False)
        assert f"`flowpp checkpoints download ckpt_1 --output {target}` continues from there." in err
    with stalling("send") as server:
        download = ("jobs", "download", "job_1", "--output", tmp_path / "files", "--url", server.url)
        code, out, err = interrupted(*download, when=reached(server))
    assert (code, out) == (130, "")
    assert f"0 of 1 files are in {tmp_path / 'files'}." in err
    assert f"`flowpp jobs download job_1 --output {tmp_path / 'files'}` continues." in err


def test_a_service_that_is_stopped_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    def started(process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "data" / "logs" / "api.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    port = free_port()
    code, out, err = interrupted("serve", "--port", str(port), "--data", tmp_path / "data", when=started)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"stopped; the data stay in {tmp_path / 'data'}"
    assert str(tmp_path / "data") not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert os.listdir(tmp_path / "data")


def test_a_signal_is_not_lost_where_python_ignores_exceptions() -> None:
    code = """
import os, signal, sys, time
from api.stack import exit_on_signals
exit_on_signals()

def interrupt():
    signal.raise_signal(getattr(signal, sys.argv[1]))
    time.sleep(0)

class Late:
    def __del__(self):
        interrupt()

if sys.argv[2] == "fork":
    os.register_at_fork(after_in_parent=interrupt)
    if not os.fork():
        os._exit(0)
else:
    Late()
time.sleep(100)
"""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        for place in ("fork", "del"):
            command = [sys.executable, "-c", code, name, place]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode, done.stderr) == (128 + signal.Signals[name], ""), (name, place)
